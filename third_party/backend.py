"""setuptools as the build backend; besides what setuptools asks for, what the CUDA extension is built with."""

import resolve
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + resolve.missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + resolve.missing()
