// What the double of TensorRT needs of the double of the CUDA driver, beside the driver's
// functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace fake {

// Ends the process with a message: the program did what the real one would not take.
[[noreturn]] void die(std::string const& message);
// Writes a line to $SSD_FAKE_LOG.
void log(std::string const& line);
// Whether $SSD_FAKE_REFUSE names the call: "call" fails always, "call:3" from its third time on.
bool refuses(std::string const& call);

// Device bytes, writable; dies where they are not inside one allocation.
std::byte* memory(uint64_t address, size_t num_bytes);
// Dies where no context is current for this thread.
void need_context(std::string const& what);
void queue(void* stream, std::function<void()> work);
bool is_capturing(void* stream);
// What lives on the device: the context may not go while any of it is alive, a stream not while
// what was made on it is.
void born(std::string const& what, void* stream = nullptr);
void gone(std::string const& what, void* stream = nullptr);

}  // namespace fake
