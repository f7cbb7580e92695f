// Which kernels run on this machine.

#pragma once

#include <string>

#include "kernels.h"

namespace halfbyte {

// The kernels in use: the fastest that the machine supports, until `use_kernels` names others.
const Kernels& kernels();

// Names that `use_kernels` accepts here, fastest first, separated by commas.
std::string available_kernels();

// Throws std::runtime_error when the machine has no such kernels.
void use_kernels(const std::string& name);

}  // namespace halfbyte
