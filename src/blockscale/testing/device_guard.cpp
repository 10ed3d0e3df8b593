// What torch's C++ asks of CUDA before any kernel: the number of the current device. A build of
// torch without CUDA has no answer; this is one.

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

c10::DeviceIndex current = 0;

struct PretendGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, PretendGuard)

}  // namespace

extern "C" void blockscale_pretend_device(int number) {
  current = static_cast<c10::DeviceIndex>(number);
}
