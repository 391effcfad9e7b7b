#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ssd_runtime {

// Writes RGB8 pixels [height, width, 3] with a text chunk for each pair; the file is whole or as it
// was. Throws Failure SSD_IO_ERROR.
void write_png(std::string const& path, uint8_t const* pixels, uint32_t width, uint32_t height,
               std::vector<std::pair<std::string, std::string>> const& texts);

}  // namespace ssd_runtime
