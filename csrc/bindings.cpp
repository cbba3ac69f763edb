#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cpp, module) { module.doc() = "CPU kernels of fastprune; see fastprune/ops.py."; }
