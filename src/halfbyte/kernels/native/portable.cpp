// For any machine: nothing but plain loops.

#define HALFBYTE_ISA portable

#include "kernels.h"
#include "plain.h"

namespace halfbyte {

const Kernels kPortable = {
    .name = "portable",
    .quantize_4bit = portable::quantize_4bit,
    .dequantize_4bit = portable::dequantize_4bit,
    .quantize_8bit = portable::quantize_8bit,
    .dequantize_8bit = portable::dequantize_8bit,
};

}  // namespace halfbyte
