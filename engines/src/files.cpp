#include "files.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "failure.h"

namespace ssd_runtime {
namespace {

constexpr size_t block_bytes = size_t{1} << 20;

[[noreturn]] void cannot_read(std::string const& path, int error) {
    fail(SSD_BAD_BUNDLE, path, " cannot be read (", std::strerror(error),
         "); check its permissions");
}

char const* kind_of(mode_t mode) {
    return S_ISFIFO(mode)   ? "a named pipe"
           : S_ISSOCK(mode) ? "a socket"
           : S_ISDIR(mode)  ? "a folder"
                            : "a device";
}

// A regular file open for reading; never waits, as opening a named pipe would.
class OpenFile {
public:
    explicit OpenFile(std::string const& path)
        : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        struct stat status{};
        if (fd_ < 0) {
            return;
        }
        if (fstat(fd_, &status) != 0) {
            int const error = errno;
            close(fd_);
            cannot_read(path, error);
        }
        if (!S_ISREG(status.st_mode)) {
            close(fd_);
            fail(SSD_BAD_BUNDLE, path, " is ", kind_of(status.st_mode),
                 ", not a file; put the file itself there");
        }
        num_bytes_ = static_cast<uint64_t>(status.st_size);
    }
    OpenFile(OpenFile const&) = delete;
    OpenFile& operator=(OpenFile const&) = delete;
    ~OpenFile() {
        if (fd_ >= 0) {
            close(fd_);
        }
    }

    int get() const { return fd_; }
    uint64_t num_bytes() const { return num_bytes_; }

private:
    int fd_;
    uint64_t num_bytes_ = 0;
};

size_t read_block(int fd, std::string const& path, char* block, size_t size) {
    for (;;) {
        ssize_t const count = read(fd, block, size);
        if (count >= 0) {
            return static_cast<size_t>(count);
        }
        if (errno != EINTR) {
            cannot_read(path, errno);
        }
    }
}

class Sha256 {
public:
    Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) {
            fail(SSD_INTERNAL_ERROR, "OpenSSL has no sha256; install libcrypto again");
        }
    }

    void update(void const* data, size_t size) {
        if (EVP_DigestUpdate(context_.get(), data, size) != 1) {
            fail(SSD_INTERNAL_ERROR, "OpenSSL could not compute a sha256");
        }
    }

    std::string hex() {
        unsigned char digest[EVP_MAX_MD_SIZE];
        unsigned size = 0;
        if (EVP_DigestFinal_ex(context_.get(), digest, &size) != 1) {
            fail(SSD_INTERNAL_ERROR, "OpenSSL could not compute a sha256");
        }
        static char const digits[] = "0123456789abcdef";
        std::string shown;
        for (unsigned i = 0; i < size; ++i) {
            shown += digits[digest[i] >> 4U];
            shown += digits[digest[i] & 15U];
        }
        return shown;
    }

private:
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

MappedFile::MappedFile(std::string const& path) {
    OpenFile const file(path);
    if (file.get() < 0) {
        cannot_read(path, errno);
    }
    size_ = static_cast<size_t>(file.num_bytes());
    if (size_ == 0) {
        return;
    }
    void* const mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (mapped == MAP_FAILED) {
        size_ = 0;
        cannot_read(path, errno);
    }
    data_ = static_cast<std::byte const*>(mapped);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        munmap(const_cast<std::byte*>(data_), size_);
    }
}

bool read_file(std::string const& path, size_t most, std::string& content) {
    OpenFile const file(path);
    if (file.get() < 0) {
        if (errno == ENOENT || errno == ENOTDIR) {
            return false;
        }
        cannot_read(path, errno);
    }
    content.clear();
    std::vector<char> block(block_bytes);
    while (size_t const count = read_block(file.get(), path, block.data(), block.size())) {
        content.append(block.data(), count);
        if (content.size() > most) {
            fail(SSD_BAD_BUNDLE, path, " has more than ", most,
                 " bytes, which no file of its kind needs");
        }
    }
    return true;
}

FileStatus file_status(std::string const& path) {
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) {
        if (errno == ENOENT || errno == ENOTDIR) {
            return {false, 0};
        }
        cannot_read(path, errno);
    }
    return {true, static_cast<uint64_t>(status.st_size)};
}

std::string sha256_of_file(std::string const& path) {
    OpenFile const file(path);
    if (file.get() < 0) {
        cannot_read(path, errno);
    }
    Sha256 sha256;
    std::vector<char> block(block_bytes);
    while (size_t const count = read_block(file.get(), path, block.data(), block.size())) {
        sha256.update(block.data(), count);
    }
    return sha256.hex();
}

std::string sha256_of_text(std::string const& content) {
    Sha256 sha256;
    sha256.update(content.data(), content.size());
    return sha256.hex();
}

bool is_utf8(std::string const& content) {
    auto const* bytes = reinterpret_cast<unsigned char const*>(content.data());
    for (size_t i = 0; i < content.size();) {
        unsigned const first = bytes[i];
        size_t const size = first < 0x80   ? 1
                            : first < 0xC2 ? 0
                            : first < 0xE0 ? 2
                            : first < 0xF0 ? 3
                            : first < 0xF5 ? 4
                                           : 0;
        if (size == 0 || i + size > content.size()) {
            return false;
        }
        for (size_t k = 1; k < size; ++k) {
            if ((bytes[i + k] & 0xC0U) != 0x80U) {
                return false;
            }
        }
        if (size > 2) {
            unsigned const second = bytes[i + 1];
            bool const overlong =
                (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
            bool const surrogate = first == 0xED && second > 0x9F;
            bool const too_high = first == 0xF4 && second > 0x8F;
            if (overlong || surrogate || too_high) {
                return false;
            }
        }
        i += size;
    }
    return true;
}

}  // namespace ssd_runtime
