#pragma once  // what kernels need of it is in common/tile.cuh
