// Prints how prompts come to the rows of a cache: lines of JSON {place, lengths, num_tokens} in,
// lines of JSON {from_prompts, in_place} out, each copy as [target, source, count, length, whether
// it is of the prompts].
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>

#include "trt/prompt_rows.h"

namespace {

using Json = nlohmann::json;

Json to_json(std::vector<ssd_runtime::RowCopy> const& copies) {
    Json rows = Json::array();
    for (ssd_runtime::RowCopy const& copy : copies) {
        rows.push_back({copy.target, copy.source, copy.count, copy.length, copy.is_of_prompts});
    }
    return rows;
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        Json const asked = Json::parse(line);
        std::vector<size_t> const place = asked.at("place");
        std::vector<int32_t> const lengths = asked.at("lengths");
        std::cout << Json{{"from_prompts",
                           to_json(ssd_runtime::copies_from_prompts(place, lengths))},
                          {"in_place",
                           to_json(ssd_runtime::copies_in_place(place, asked.at("num_tokens")))}}
                  << "\n";
    }
}
