"""The one compiled file. Everything else about the package is in pyproject.toml.

It is optional: without a compiler the installation goes on, and the same warp is computed by torch, more slowly.
"""

import sys

from setuptools import Extension, setup

# Products and sums are never contracted: every processor gives the same bits. Nothing here reads the floating-point traps or errno.
FLAGS = (
    ["/O2", "/std:c11"]
    if sys.platform == "win32"
    else ["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
)
WARP = Extension(
    "microtome.training._warp",
    ["src/microtome/training/_warp.c"],
    depends=["src/microtome/training/_warp.h"],
    extra_compile_args=FLAGS,
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[WARP], options={"bdist_wheel": {"py_limited_api": "cp311"}})
