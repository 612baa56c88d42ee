// How the C ABI says what went wrong.
#pragma once

#include <cstdio>

namespace elang {

// "<what> failed: <why>", which lives until the thread's next call.
inline const char* failed(const char* what, const char* why) {
  static thread_local char text[300];
  std::snprintf(text, sizeof(text), "%s failed: %s", what, why);
  return text;
}

}  // namespace elang
