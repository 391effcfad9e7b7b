#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ssd_runtime {

// A file mapped into memory for reading; unmapped when it goes.
class MappedFile {
public:
    MappedFile() = default;
    // Throws Failure SSD_BAD_BUNDLE where the file cannot be opened or mapped.
    explicit MappedFile(std::string const& path);
    MappedFile(MappedFile const&) = delete;
    MappedFile& operator=(MappedFile const&) = delete;
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    ~MappedFile();

    std::byte const* data() const { return data_; }
    size_t size() const { return size_; }

private:
    std::byte const* data_ = nullptr;
    size_t size_ = 0;
};

// The content of a regular file; false where there is none. Throws Failure where it cannot be read
// or has more than `most` bytes.
bool read_file(std::string const& path, size_t most, std::string& content);

// What a file is known by. Throws Failure where it is not there or cannot be read.
struct FileStatus {
    bool exists;
    uint64_t num_bytes;
};
FileStatus file_status(std::string const& path);

// Hexadecimal sha256 of a file. Throws Failure where it cannot be read.
std::string sha256_of_file(std::string const& path);
std::string sha256_of_text(std::string const& content);

// Whether these bytes are UTF-8 without surrogates.
bool is_utf8(std::string const& content);

}  // namespace ssd_runtime
