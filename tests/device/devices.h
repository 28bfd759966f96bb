// The devices that cases run on: the GPU that is there, or several that the simulator pretends to be.
#pragma once

#include <functional>
#include <string>

#if defined(GRADFAST_SHIM)
#include "fake_runtime.h"
#endif

namespace test {

#if defined(GRADFAST_SHIM)

// Puts the simulated device back as it was.
class OtherDevice {
 public:
  explicit OtherDevice(const std::function<void(shim::Device&)>& change) : before_(shim::device()) {
    change(shim::device());
  }
  ~OtherDevice() { shim::device() = before_; }
  OtherDevice(const OtherDevice&) = delete;
  OtherDevice& operator=(const OtherDevice&) = delete;

 private:
  shim::Device before_;
};

// One launch with kept gradients, and two launches; threads in different orders.
inline void for_each_device(const std::function<void(const std::string&)>& body) {
  body("");
  {
    const OtherDevice device([](shim::Device& d) {
      d.cooperative = false;
      d.order.kind = shim::Order::descending;
    });
    body(", two launches");
  }
}

#else

inline void for_each_device(const std::function<void(const std::string&)>& body) { body(""); }

#endif

}  // namespace test
