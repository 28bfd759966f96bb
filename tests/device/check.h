// Checks that count, and cases that catch: the least that a test program needs.
#pragma once

#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <source_location>
#include <string>

namespace test {

inline int passed = 0;
inline int failed = 0;
inline std::string case_name;

inline void check(bool ok, const std::string& what,
                  const std::source_location& where = std::source_location::current()) {
  if (ok) {
    ++passed;
    return;
  }
  if (++failed <= 40) {
    std::printf("FAILED %s: %s (line %u)\n", case_name.c_str(), what.c_str(), static_cast<unsigned>(where.line()));
  }
}

inline void run_case(const std::string& name, const std::function<void()>& body) {
  case_name = name;
  const int failed_before = failed;
  const auto start = std::chrono::steady_clock::now();
  try {
    body();
  } catch (const std::exception& error) {
    check(false, std::string("threw ") + error.what());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%-4s %s (%.1f s)\n", failed == failed_before ? "ok" : "FAIL", name.c_str(), seconds.count());
  std::fflush(stdout);
}

// The message that `body` throws; empty if it does not.
inline std::string thrown_by(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace test
