// Compile what follows for an instruction set, whatever the build machine is. A source defines
// HALFBYTE_TARGET, includes its system headers, then this, then ours; target_end.h closes it.

#define HALFBYTE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HALFBYTE_PUSH(features) \
  HALFBYTE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#else
#define HALFBYTE_PUSH(features) \
  HALFBYTE_PRAGMA(GCC push_options) HALFBYTE_PRAGMA(GCC target(features))
#endif
HALFBYTE_PUSH(HALFBYTE_TARGET)
