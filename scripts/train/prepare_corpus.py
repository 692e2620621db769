#!/usr/bin/env python3
"""Build the training text of `kda-hf-tiny` from Debian packages.

    python scripts/train/prepare_corpus.py --out .data            # downloads, about ten minutes on two cores
    python scripts/train/prepare_corpus.py --out .data --caps 4   # for healing: more manuals
    python scripts/train/prepare_corpus.py --out .data --only r-cran-janeaustenr --sample 5

Each package of `PACKAGES` is fetched with `apt-get download` and read as a stream: nothing is installed or unpacked.
Out of its files come paragraphs of English prose; markup, tables, code, menus and everything that does not read like
sentences is dropped, repeated paragraphs are dropped across all packages, and about one block in a hundred is held
out by a hash of its text, so that the split stays the same when sources are added.

Writes to `--out`: `train.txt` and `heldout.txt` (documents separated by `<|endoftext|>`), `heldout_small.txt` (only
its public-domain text, small enough to ship with the model) and `sources.json` (package, version, licence, bytes
kept).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import html
import json
import lzma
import random
import re
import struct
import subprocess
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple


SEPARATOR = "<|endoftext|>"
BLOCK_BYTES = 6_000  # documents are cut into blocks of about this size: the unit of the held-out split
HELDOUT_PER_MILLE = 10


class Package(NamedTuple):
    """Where prose is found in one Debian package."""

    name: str
    kind: str  # which extractor reads its files
    paths: str  # regular expression, searched in the path of each file
    cap: int = 3_000_000  # most bytes kept, so that no manual drowns the narrative
    public_domain: bool = False
    licence: str = ""  # where the package's own copyright file does not tell it plainly


HTML = r"\.x?html?(\.gz)?$"
TEXT = r"\.(txt|rst|md|text)(\.gz)?$"

PACKAGES = [
    # Books
    Package("sword-text-kjv", "sword", r"/(ot|nt)\.bz[svz]$", 9_000_000, public_domain=True),
    Package("sword-text-web", "sword", r"/(ot|nt)\.bz[svz]$", 9_000_000, public_domain=True),
    Package("r-cran-janeaustenr", "rdb", r"/data/Rdata\.rdb$", 9_000_000, public_domain=True),
    Package("anarchism", "markup", HTML, 2_000_000),
    Package("dict-devil", "text", r"devil\.dict\.dz$", public_domain=True),
    Package("jargon-text", "text", r"jargon\.txt\.gz$", public_domain=True),
    Package("dict-foldoc", "text", r"foldoc\.dict\.dz$"),
    Package("golang-1.19-src", "text", r"Isaac\.Newton-Opticks\.txt$", public_domain=True),
    Package("debian-history", "markup", r"\.en\.html$"),
    Package("doc-debian", "text", TEXT),
    Package("miscfiles", "text", r"/state/|/misc/.*(const|decl|magna).*"),
    # Stories told by games: dialogue and descriptions
    *(
        Package(f"wesnoth-1.16-{campaign}", "quoted", r"\.cfg$", licence="GPL-2+")
        for campaign in (
            "data",
            "did",
            "dm",
            "dw",
            "ei",
            "httt",
            "l",
            "low",
            "nr",
            "sof",
            "sota",
            "sotbe",
            "thot",
            "trow",
        )
        + ("tsg", "ttb", "utbs")
    ),
    Package("endless-sky-data", "quoted", r"/data/.*\.txt$", 6_000_000),
    Package("cataclysm-dda-data", "quoted", r"/cataclysm-dda/(json|core|mods)/.*\.json$", 6_000_000),
    Package("naev-data", "quoted", r"\.(lua|xml)$", 6_000_000),
    Package("freeorion-data", "quoted", r"stringtables/en\.txt$"),
    Package("widelands-data", "quoted", r"/(scripting|campaigns|tribes|txts|world)/.*\.lua$"),
    Package("crawl-common", "text", r"/(descript|database|docs)/.*\.txt$"),
    Package("angband-data", "text", r"/(help|gamedata)/.*\.txt$"),
    Package("freeciv-data", "quoted", r"(helpdata\.txt|\.ruleset)$"),
    Package("lincity-ng-data", "markup", r"/help/en/.*\.xml$"),
    Package("stellarium-data", "markup", r"(description\.en\.utf8|/en/.*\.md|landscapes/.*en\.utf8|description\.md)$"),
    # Handbooks and manuals
    Package("gimp-help-en", "markup", HTML, 1_500_000, licence="GFDL-NIV-1.2+"),
    *(
        Package(name, "markup", paths, 1_500_000)
        for name, paths in {
            "debian-handbook": r"/en-US/.*html$",
            "debian-reference-en": r"\.en\.html$",
            "developers-reference": r"developers-reference/[^/]*\.html$",
            "debian-policy": HTML,
            "maint-guide": r"\.en\.html$",
            "debmake-doc": r"\.en\.html$",
            "debian-faq": HTML,
            "debian-kernel-handbook": HTML,
            "harden-doc": HTML,
            "installation-guide-amd64": r"/en/.*html?$",
            "live-manual-html": r"\.en\.html$|/en/",
            "debian-edu-doc-en": HTML,
            "freedombox-doc-en": HTML,
            "aptitude-doc-en": HTML,
            "gnucash-docs": r"/C/.*(html|xml|docbook)$",
            "gnome-user-docs": r"/C/.*\.page$",
            "evolution-common": r"/C/.*\.page$",
            "gnumeric-doc": r"/C/.*(xml|docbook|html)$",
            "kmymoney-common": r"/en/.*docbook(\.bz2)?$",
            "libreoffice-help-en-us": HTML,
            "homebank-data": HTML,
            "lifelines-doc": HTML,
            "abs-guide": HTML,
            "grass-doc": HTML,
            "kicad-doc-en": HTML,
            "apache2-doc": r"\.html(\.en)?$",
            "postgresql-doc-15": HTML,
            "sqlite3-doc": HTML,
            "git-doc": HTML,
            "python3.11-doc": HTML,
            "python-django-doc": HTML,
            "python-sklearn-doc": HTML,
            "python-scipy-doc": r"tutorial.*html$|dev.*html$",
            "python-sympy-doc": r"tutorial.*html$|explanation.*html$|guides.*html$",
            "python-pandas-doc": r"user_guide/.*html$|development/.*html$|getting_started/.*html$|whatsnew/.*html$",
            "python-astropy-doc": HTML,
            "rust-doc": r"/(book|reference|nomicon|rustc|cargo|embedded-book|edition-guide)/.*\.html$",
            "ghc-doc": r"users_guide/.*\.html$",
            "racket-doc": r"/(guide|quick|web-server|scribble|plot|teach|more|htdp.*)/.*\.html$",
            "erlang-doc": HTML,
            "guile-3.0-doc": HTML,
            "r-doc-html": HTML,
            "octave-doc": HTML,
            "maxima-doc": HTML,
            "gnuplot-doc": HTML,
            "csound-doc": HTML,
            "lilypond-doc-html": HTML,
            "povray-doc": HTML,
            "renpy-doc": HTML,
            "sonic-pi-server-doc": HTML,
            "gm-assistant-doc": HTML,
            "hydrogen-doc": HTML,
            "nsis-doc": HTML,
            "exim4-doc-html": HTML,
            "varnish-doc": HTML,
            "shorewall-doc": HTML,
            "bacula-doc": HTML,
            "ganeti-doc": HTML,
            "fai-doc": HTML,
            "mailman3-doc": HTML,
            "beets-doc": HTML,
            "mopidy-doc": HTML,
            "jmeter-help": HTML,
            "gap-doc": HTML,
            "ada-reference-manual-2012": HTML,
            "linux-doc-6.1": r"/html/.*\.html$",
        }.items()
    ),
    Package("c++-annotations-txt", "text", r"\.txt(\.gz)?$"),
    Package("zim", "text", r"/manual/.*\.txt$"),
    Package("perl-doc", "pod", r"\.pod$"),
    Package("vim-runtime", "text", r"/doc/.*\.txt$"),
    Package("guile-3.0-doc", "text", r"\.info.*gz$"),
    Package("gtypist", "text", r"\.typ$"),
]

# --- Extractors: bytes of a file in, raw paragraphs out --------------------------------------------------------------

# Elements whose text is never prose, and those that end a paragraph; every other tag is removed and its text kept.
NOT_PROSE = re.compile(
    r"<(script|style|pre|table|nav|head|header|footer|aside|form|select|button|svg|math|programlisting|screen|synopsis|"
    r"literallayout|informaltable|variablelist-toc|toc|bookinfo|info|credit|note\s+placement|title)\b[^>]*>.*?</\1\s*>",
    re.S | re.I,
)
BREAK = re.compile(
    r"</?(p|para|simpara|div|li|listitem|dd|dt|td|tr|h\d|ul|ol|dl|blockquote|section|article|body|item|term|br\s*/?\s*><br|"
    r"chapter|sect\d|note|tip|varlistentry|figure|center|hr|page|text)\b[^>]*>",
    re.I,
)
TAG = re.compile(r"<!--.*?-->|<[^>]{1,2000}>", re.S)


def read_markup(text: str) -> Iterator[str]:
    """HTML, DocBook, Mallard: the text between block elements."""
    text = NOT_PROSE.sub("\n\0", text)
    for block in re.split("\0", BREAK.sub("\0", text)):
        yield html.unescape(TAG.sub("", block))


def read_text(text: str) -> Iterator[str]:
    """Plain text: blocks between blank lines, none of whose lines is set off like code or a table."""
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        if not re.search(r"\S {3,}\S|\t\S.*\t", block):
            yield block


def read_pod(text: str) -> Iterator[str]:
    """Perl's documentation: drop commands and indented code, unwrap `C<...>` and the like."""
    for block in re.split(r"\n\s*\n", text):
        if not block.startswith(("=", " ", "\t")):
            for _ in range(3):
                block = re.sub(r"[A-Z]<+ ?([^<>|]*\|)?([^<>]*?) ?>+", r"\2", block)
            yield block


def read_quoted(text: str) -> Iterator[str]:
    """Game data: string literals, in the order in which the story tells them."""
    literal = r"'''(.*?)'''|" r'"((?:[^"\\]|\\.|"")*)"|`([^`]*)`|\[\[(.*?)\]\]|<(?:description|desc|bar|lore)>(.*?)<'
    for match in re.finditer(literal, text, re.S):
        string = next(group for group in match.groups() if group is not None)
        string = string.replace("\\\n", " ").replace('""', '"')  # a line continued, a quote inside a quote
        for block in re.split(r"\\n|\n\s*\n", string):
            yield re.sub(r"</?(i|b|em|big|small|span|color)\b[^>]*>", "", block.replace('\\"', '"'))


def read_sword(files: dict[str, bytes]) -> Iterator[str]:
    """A SWORD Bible module: compressed blocks of OSIS XML, one chapter after the other."""
    for testament in ("ot", "nt"):
        index, data = (next(body for path, body in files.items() if path.endswith(f"{testament}.bz{x}")) for x in "sz")
        for offset, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            osis = zlib.decompress(data[offset : offset + size]).decode(errors="ignore")
            osis = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.S)
            # Poetry is set in lines; a paragraph of several lines reads as well.
            for paragraph in re.split(r'<chapter [^>]*>|<(?:div|lg) [^>]*type="x-p"[^>]*/>|<lg [^>]*>', osis):
                yield TAG.sub(" ", paragraph).replace("\u00b6", " ")
                if "</chapter" in paragraph or 'eID="' in paragraph and "<chapter" in paragraph:
                    yield ""


def read_rdb(files: dict[str, bytes]) -> Iterator[str]:
    """R's lazy-load database of character vectors, as of lines of books: compressed serialised objects end to end."""
    body = next(iter(files.values()))
    position = 0
    while position + 5 < len(body):
        try:
            stream = zlib.decompressobj()
            raw = stream.decompress(body[position + 4 :])
            position = len(body) - len(stream.unused_data)
        except zlib.error:
            kind, rest = body[position + 4 : position + 5], body[position + 5 :]
            decoder = bz2.BZ2Decompressor() if kind == b"2" else lzma.LZMADecompressor()
            raw = decoder.decompress(rest)
            position = len(body) - len(decoder.unused_data)
        # A CHARSXP is its flags (type 9), a length and the bytes.
        lines, cursor = [], 0
        for match in re.finditer(rb"\x00[\x00-\xff]\x00\x09([\x00-\xff]{4})", raw):
            length = int.from_bytes(match[1], "big")
            if match.start() >= cursor and length < 500:
                cursor = match.end() + length
                lines.append(raw[match.end() : cursor].decode("utf-8", "ignore"))
        yield from read_text("\n".join(lines))


READERS = {"markup": read_markup, "text": read_text, "pod": read_pod, "quoted": read_quoted}
WHOLE_PACKAGE_READERS = {"sword": read_sword, "rdb": read_rdb}

# --- What counts as prose --------------------------------------------------------------------------------------------

COMMON_WORDS = set(
    """
    the of and to a in is that it for as with be on by this are not or from at an was you which have if can will has
    but his he i they all we one there when so no were their what would her she my me him had your been its them do
    then than into out up who more some any only other may must should could these those about where how our us
    """.split()  # noqa: SIM905 - a list of 100 quoted words does not read better
)
PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": " - ",
        "\u2026": "...",
        "\u00a0": " ",
    }
)
NOISE = re.compile(r"https?:|www\.|[{}<>|\\=@^~$\[\]#*%/]|::|->|\(\)|\bCopyright\b|\w_\w|--\w|&\w")
# Footnote marks, single letters that an editor put in brackets, empty brackets, _emphasis_
APPARATUS = re.compile(r"\s*\[[^\]]{2,40}\]|\[(?=\w\])|(?<=\[\w)\]|\s*\(\s*\)|_(?=\w)|(?<=[\w.,;!?])_")


def clean(raw: str) -> str:
    """One line of normalised text: plain quotes and dashes, single spaces."""
    text = unicodedata.normalize("NFKC", raw.translate(PUNCTUATION))
    text = re.sub(r"(?<=\w)\s*--+\s*(?=\w)", " - ", APPARATUS.sub("", text)).replace("``", '"').replace("''", '"')
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\s+([,.;:!?])(?=\s|$)", r"\1", text)


def is_prose(text: str, story: bool = False) -> bool:
    """Whether a cleaned paragraph reads as English sentences; in a story a short line of dialogue counts too."""
    shortest, fewest_words, fewest_common = (24, 5, 0.25) if story else (60, 10, 0.33)
    if not shortest <= len(text) <= 6_000 or text[-1] not in '.!?:")' or not (text[0].isupper() or text[0] in "\"'("):
        return False
    if len(NOISE.findall(text)) > len(text) / 400 or sum(c.isdigit() for c in text) > len(text) / 40:
        return False
    words = re.findall(r"[A-Za-z']+", text)
    letters = sum(len(word) for word in words)
    if len(words) < fewest_words or letters < 0.76 * len(text) or not 3.2 <= letters / len(words) <= 6.2:
        return False
    if (
        sum(word.isupper() and len(word) > 1 for word in words) > len(words) / 12
        or not text.isascii()
        and (sum(not c.isascii() for c in text) > len(text) / 60)
    ):
        return False
    return sum(word.lower() in COMMON_WORDS for word in words) >= fewest_common * len(words)


# --- Packages --------------------------------------------------------------------------------------------------------


def download(names: Iterable[str], folder: Path) -> None:
    """Fetch the packages that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in dict.fromkeys(names) if not any(folder.glob(f"{name}_*.deb"))]
    for start in range(0, len(missing), 10):
        print(f"downloading {start + 1}-{min(start + 10, len(missing))} of {len(missing)} packages", flush=True)
        subprocess.run(["apt-get", "download", "-q", *missing[start : start + 10]], cwd=folder, check=True)


def read_package(archive: Path, wanted: str) -> tuple[dict[str, bytes], str]:
    """The files whose path matches, uncompressed and in order, and the text of the package's copyright file."""
    files, copyright_text = {}, ""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as dpkg:
        with tarfile.open(fileobj=dpkg.stdout, mode="r|") as contents:
            for member in contents:
                is_copyright = re.search(r"/usr/share/doc/[^/]+/copyright$", member.name)
                if not member.isfile() or not (is_copyright or re.search(wanted, member.name)):
                    continue
                body = contents.extractfile(member).read()
                if body[:2] == b"\x1f\x8b":
                    body = gzip.decompress(body)
                elif body[:3] == b"BZh":
                    body = bz2.decompress(body)
                if is_copyright:
                    copyright_text = body.decode(errors="ignore")
                else:
                    files[member.name] = body
        dpkg.stdout.read()  # the padding after the last member, without which dpkg-deb reports a broken pipe
    return dict(sorted(files.items())), copyright_text


def licence_of(copyright_text: str) -> str:
    """The licence names of a package's copyright file, in short."""
    names = re.findall(r"^License:[ \t]*(\S[^\n]{0,50})$", copyright_text, re.M)
    if not names:  # not in Debian's machine-readable form, or with the text in place of a name
        text = " ".join(copyright_text.split())
        known = {
            "public domain": "public-domain",
            "Free Documentation License": "GFDL",
            "Lesser General Public|Library General Public": "LGPL",
            "GNU General Public|GNU GPL|common-licenses/GPL": "GPL",
            "Creative Commons": "Creative Commons",
            "Apache License": "Apache-2.0",
            "Python Software Foundation License|PSF LICENSE": "PSF-2.0",
            "ImageMagick": "ImageMagick",
            "Redistribution and use in source": "BSD",
            "Permission is hereby granted": "MIT",
            "make and distribute verbatim copies": "verbatim copies, and changed ones under the same terms",
        }
        names = [name for pattern, name in known.items() if re.search(pattern, text, re.I)]
    return ", ".join(list(dict.fromkeys(names))[:4]) or "see the package's copyright file"


def extract(package: Package, folder: Path) -> tuple[list[list[str]], dict]:
    """The documents of a package, each a list of paragraphs of prose, and what is recorded about it."""
    archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))))
    files, copyright_text = read_package(archive, package.paths)
    if package.kind in WHOLE_PACKAGE_READERS:
        raw_documents = [WHOLE_PACKAGE_READERS[package.kind](files)]
    else:
        reader = READERS[package.kind]
        raw_documents = [reader(body.decode("utf-8", errors="ignore")) for body in files.values()]
    story = package.kind in ("sword", "rdb", "quoted")
    documents = [[text for text in map(clean, raw) if is_prose(text, story)] for raw in raw_documents]
    about = {
        "package": package.name,
        "version": archive.name.split("_")[1].replace("%3a", ":"),
        "licence": "public-domain" if package.public_domain else package.licence or licence_of(copyright_text),
    }
    return documents, about


def into_blocks(paragraphs: list[str]) -> Iterator[str]:
    """Consecutive paragraphs joined up to about `BLOCK_BYTES`."""
    block, size = [], 0
    for paragraph in paragraphs:
        block.append(paragraph)
        size += len(paragraph)
        if size >= BLOCK_BYTES:
            yield "\n\n".join(block)
            block, size = [], 0
    if size >= 200:
        yield "\n\n".join(block)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".data"), help="working directory (default: .data)")
    parser.add_argument("--only", nargs="*", help="packages to read, to look at them (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="print this many blocks of each package; write nothing")
    parser.add_argument("--caps", type=float, default=1.0, help="keep so many times as much of large packages")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    packages = [package for package in PACKAGES if not args.only or package.name in args.only]
    archives = args.out / "debs"
    download((package.name for package in packages), archives)

    seen: set[int] = set()  # a hash of the letters of every paragraph kept so far
    train, heldout, small_heldout, sources = [], [], [], []
    with ProcessPoolExecutor(args.workers) as pool:
        for number, (package, (documents, about)) in enumerate(
            zip(packages, pool.map(extract, packages, [archives] * len(packages)), strict=True), 1
        ):
            blocks = []
            for paragraphs in documents:
                fresh = []
                for paragraph in paragraphs:
                    key = digest(re.sub(r"[^a-z]", "", paragraph.lower()))
                    if key not in seen:
                        seen.add(key)
                        fresh.append(paragraph)
                blocks.extend(into_blocks(fresh))
            cap = package.cap * args.caps
            if sum(map(len, blocks)) > cap:  # keep a deterministic choice of the blocks, in their order
                kept, size = set(), 0
                for block in sorted(blocks, key=digest):
                    size += len(block)
                    if size <= cap:
                        kept.add(block)
                blocks = [block for block in blocks if block in kept]
            if args.sample:
                for paragraph in random.Random(0).sample(blocks, min(args.sample, len(blocks))):
                    print("   ", paragraph[:700].replace("\n\n", "\n    "), end="\n\n")
            held = [block for block in blocks if digest(block) % 1000 < HELDOUT_PER_MILLE]
            kept = [block for block in blocks if digest(block) % 1000 >= HELDOUT_PER_MILLE]
            train += kept
            heldout += held
            if package.public_domain:
                small_heldout += held
            about |= {"train_bytes": len("".join(kept).encode()), "heldout_bytes": len("".join(held).encode())}
            sources.append(about)
            size = f"{about['train_bytes'] / 1e6:.2f} MB"
            print(f"[{number}/{len(packages)}] {package.name}: {size} ({about['licence']})", flush=True)
    size, held = sum(map(len, train)) / 1e6, sum(map(len, heldout)) / 1e6
    print(f"train {size:.1f} MB in {len(train)} blocks, held out {held:.2f} MB")
    if args.sample:
        return
    random.Random(0).shuffle(train)  # so that a training window that spans two blocks sees unrelated sources
    for name, documents in (("train", train), ("heldout", heldout), ("heldout_small", small_heldout)):
        (args.out / f"{name}.txt").write_text(SEPARATOR.join(documents))
    (args.out / "sources.json").write_text(json.dumps(sources, indent=1))


if __name__ == "__main__":
    main()
