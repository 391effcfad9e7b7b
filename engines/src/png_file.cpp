#include "png_file.h"

#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <random>

#include <png.h>

#include "failure.h"

namespace ssd_runtime {
namespace {

struct Reason {
    char text[200];
};

void on_error(png_structp png, png_const_charp message) {
    auto* reason = static_cast<Reason*>(png_get_error_ptr(png));
    std::snprintf(reason->text, sizeof reason->text, "%s", message);
    png_longjmp(png, 1);
}

void on_warning(png_structp, png_const_charp) {}

bool is_ascii(char const* text) {
    return std::all_of(text, text + std::strlen(text),
                       [](char byte) { return static_cast<unsigned char>(byte) < 0x80U; });
}

// libpng leaves by longjmp, so nothing in here has a destructor.
bool encode(std::FILE* file, uint8_t const* pixels, uint32_t width, uint32_t height,
            png_text* texts, int num_texts, Reason* reason) {
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, reason, on_error, on_warning);
    png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
    if (info == nullptr || setjmp(png_jmpbuf(png)) != 0) {
        png_destroy_write_struct(&png, &info);
        return false;
    }
    png_init_io(png, file);
    png_set_IHDR(png, info, width, height, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_set_text(png, info, texts, num_texts);
    png_write_info(png, info);
    for (uint32_t row = 0; row < height; ++row) {
        png_write_row(png, pixels + static_cast<size_t>(row) * width * 3);
    }
    png_write_end(png, info);
    png_destroy_write_struct(&png, &info);
    return true;
}

}  // namespace

void write_png(std::string const& path, uint8_t const* pixels, uint32_t width, uint32_t height,
               std::vector<std::pair<std::string, std::string>> const& texts) {
    std::vector<png_text> chunks(texts.size());
    for (size_t i = 0; i < texts.size(); ++i) {
        bool const plain = is_ascii(texts[i].second.c_str());
        chunks[i].compression = plain ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE;
        chunks[i].key = const_cast<char*>(texts[i].first.c_str());
        chunks[i].text = const_cast<char*>(texts[i].second.c_str());
        chunks[i].text_length = plain ? texts[i].second.size() : 0;
        chunks[i].itxt_length = plain ? 0 : texts[i].second.size();
    }
    std::string const partial = text(path, ".partial-", std::hex, std::random_device()());
    Reason reason{"out of memory"};
    std::FILE* const file = std::fopen(partial.c_str(), "wbx");
    bool written = file != nullptr && encode(file, pixels, width, height, chunks.data(),
                                             static_cast<int>(chunks.size()), &reason);
    if (file == nullptr) {
        std::snprintf(reason.text, sizeof reason.text, "%s", std::strerror(errno));
    } else if (std::fclose(file) != 0 ||
               (written && std::rename(partial.c_str(), path.c_str()) != 0)) {
        std::snprintf(reason.text, sizeof reason.text, "%s", std::strerror(errno));
        written = false;
    }
    if (!written) {
        std::remove(partial.c_str());
        fail(SSD_IO_ERROR, "cannot write ", path, " (", reason.text,
             "); free space or choose another place");
    }
}

}  // namespace ssd_runtime
