#include "cgroups.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <sstream>

namespace ssd_runtime {
namespace {

constexpr uint64_t no_limit_v1 = uint64_t{1} << 60U;  // the largest multiple of a page means none
constexpr uint64_t most = std::numeric_limits<uint64_t>::max();

struct Group {
    std::string folder;
    int version;

    bool operator==(Group const& other) const {
        return folder == other.folder && version == other.version;
    }
};

// A mounted hierarchy. top: the group that is mounted at point.
struct Mount {
    std::vector<std::string> top;
    std::string point;
    int version;
};

struct Controller {
    char const* name;
    char const* limit_file[2];  // of version 1 and of version 2
};
constexpr Controller memory{"memory", {"memory.limit_in_bytes", "memory.max"}};
constexpr Controller cpu{"cpu", {"cpu.cfs_quota_us", "cpu.max"}};

// "" where it cannot be read.
std::string content_of(std::string const& path) {
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

std::vector<std::string> words_of(std::string const& line) {
    std::istringstream stream(line);
    return {std::istream_iterator<std::string>(stream), {}};
}

std::vector<std::string> split(std::string const& line, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(line);
    for (std::string part; std::getline(stream, part, separator);) {
        parts.push_back(part);
    }
    return parts;
}

bool contains(std::vector<std::string> const& list, std::string const& wanted) {
    return std::find(list.begin(), list.end(), wanted) != list.end();
}

// None for what is no number; the greatest for one that is greater.
std::optional<uint64_t> number(std::string const& word) {
    if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) {
        return std::nullopt;
    }
    uint64_t value = 0;
    std::istringstream stream(word);
    return stream >> value ? value : most;
}

// The only number of a file; none for no such file, and for "max".
std::optional<uint64_t> number_in(std::string const& path) {
    std::vector<std::string> const words = words_of(content_of(path));
    return words.size() == 1 ? number(words[0]) : std::nullopt;
}

uint64_t sum(uint64_t one, uint64_t other) { return one > most - other ? most : one + other; }
uint64_t difference(uint64_t one, uint64_t other) { return one > other ? one - other : 0; }

std::map<std::string, uint64_t> statistics(std::string const& folder) {
    std::map<std::string, uint64_t> found;
    for (std::string const& line : split(content_of(folder + "/memory.stat"), '\n')) {
        std::vector<std::string> const words = words_of(line);
        std::optional<uint64_t> const value = words.size() == 2 ? number(words[1]) : std::nullopt;
        if (value) {
            found[words[0]] = *value;
        }
    }
    return found;
}

// Bytes of clean page cache, and of the kernel's own caches, which it drops when asked.
uint64_t reclaimable(std::string const& folder, int version) {
    auto const found = statistics(folder);
    auto const value = [&found](std::string const& name) {
        auto const entry = found.find(name);
        return entry == found.end() ? 0 : entry->second;
    };
    bool const is_v1 = version == 1;  // which counts the groups below under other names
    std::string const prefix = is_v1 ? "total_" : "";
    uint64_t const files = sum(value(prefix + "inactive_file"), value(prefix + "active_file"));
    uint64_t const dirty = sum(value(prefix + (is_v1 ? "dirty" : "file_dirty")),
                               value(prefix + (is_v1 ? "writeback" : "file_writeback")));
    return sum(difference(files, dirty), value("slab_reclaimable"));
}

// memory.high counts too: above it the kernel slows a group until it stands.
void add_v2(std::string const& folder, uint64_t swap_free, std::vector<MemoryLimit>& limits) {
    uint64_t const used = number_in(folder + "/memory.current").value_or(0);
    uint64_t swap = swap_free;
    if (auto const limit = number_in(folder + "/memory.swap.max")) {
        uint64_t const in_swap = number_in(folder + "/memory.swap.current").value_or(0);
        swap = std::min(swap, difference(*limit, in_swap));
    }
    for (char const* const name : {"/memory.max", "/memory.high"}) {
        if (auto const limit = number_in(folder + name)) {
            uint64_t const left = difference(sum(*limit, reclaimable(folder, 2)), used);
            limits.push_back({*limit, sum(left, swap)});
        }
    }
}

// Of memory, and of memory and swap together.
void add_v1(std::string const& folder, uint64_t swap_free, std::vector<MemoryLimit>& limits) {
    auto const stat = statistics(folder);
    uint64_t const given_back = reclaimable(folder, 1);
    for (bool const with_swap : {false, true}) {
        std::string const kind = with_swap ? "memory.memsw" : "memory";
        // parents that a container does not see stand in memory.stat alone
        auto const seen =
            stat.find(with_swap ? "hierarchical_memsw_limit" : "hierarchical_memory_limit");
        uint64_t limit = number_in(folder + "/" + kind + ".limit_in_bytes").value_or(no_limit_v1);
        limit = std::min(limit, seen == stat.end() ? no_limit_v1 : seen->second);
        if (limit < no_limit_v1) {
            uint64_t const used = number_in(folder + "/" + kind + ".usage_in_bytes").value_or(0);
            limits.push_back(
                {limit, sum(difference(sum(limit, given_back), used), with_swap ? 0 : swap_free)});
        }
    }
}

// A path's parts, the root's first: "/a/b" is {"/", "a", "b"}.
std::vector<std::string> parts_of(std::string const& path) {
    std::vector<std::string> parts;
    if (!path.empty() && path[0] == '/') {
        parts.emplace_back("/");
    }
    for (std::string const& part : split(path, '/')) {
        if (!part.empty() && part != ".") {
            parts.push_back(part);
        }
    }
    return parts;
}

// A field of mountinfo: a space is written as backslash 040.
std::string unescaped(std::string const& field) {
    std::string plain;
    for (size_t i = 0; i < field.size(); ++i) {
        bool const is_code = field[i] == '\\' && i + 3 < field.size() &&
                             field.find_first_not_of("01234567", i + 1) > i + 3;
        if (is_code) {
            plain += static_cast<char>(std::stoi(field.substr(i + 1, 3), nullptr, 8));
            i += 3;
        } else {
            plain += field[i];
        }
    }
    return plain;
}

// The process's group by version, from /proc/self/cgroup: `4:memory:/a/b`, `0::/a/b`.
std::map<int, std::vector<std::string>> own_paths(Controller const& controller,
                                                  std::string const& root) {
    std::map<int, std::vector<std::string>> paths;
    for (std::string const& line : split(content_of(root + "/proc/self/cgroup"), '\n')) {
        size_t const first = line.find(':');
        size_t const second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        std::string const controllers = line.substr(first + 1, second - first - 1);
        if (line.compare(0, first, "0") == 0 && controllers.empty()) {
            paths[2] = parts_of(line.substr(second + 1));
        } else if (contains(split(controllers, ','), controller.name)) {
            paths[1] = parts_of(line.substr(second + 1));
        }
    }
    return paths;
}

// Mounts of a controller, from /proc/self/mountinfo (proc(5)): `... top point ... - type`.
std::vector<Mount> mounts_of(Controller const& controller, std::string const& root) {
    std::vector<Mount> mounts;
    for (std::string const& line : split(content_of(root + "/proc/self/mountinfo"), '\n')) {
        size_t const dash = line.find(" - ");
        if (dash == std::string::npos) {
            continue;
        }
        std::vector<std::string> const fields = words_of(line.substr(0, dash));
        std::vector<std::string> const kind = words_of(line.substr(dash + 3));
        if (fields.size() < 5 || kind.size() < 3) {
            continue;
        }
        int const version = kind[0] == "cgroup2" ? 2 : kind[0] == "cgroup" ? 1 : 0;
        if (version == 2 || (version == 1 && contains(split(kind[2], ','), controller.name))) {
            mounts.push_back(
                {parts_of(unescaped(fields[3])), root + "/" + unescaped(fields[4]), version});
        }
    }
    return mounts;
}

// The group and its parents up to what is mounted. whatever_is_mounted: also where the group is not
// below that.
void add_between(Mount const& mount, std::vector<std::string> const& own, bool whatever_is_mounted,
                 std::vector<Group>& groups) {
    bool const is_below = own.size() >= mount.top.size() &&
                          std::equal(mount.top.begin(), mount.top.end(), own.begin());
    if (!is_below && !whatever_is_mounted) {
        return;
    }
    std::vector<std::string> folders = {mount.point};
    for (size_t part = mount.top.size(); is_below && part < own.size(); ++part) {
        folders.push_back(folders.back() + "/" + own[part]);
    }
    for (auto folder = folders.rbegin(); folder != folders.rend(); ++folder) {
        groups.push_back({*folder, mount.version});
    }
}

bool has_limit(Group const& group, Controller const& controller) {
    return !content_of(group.folder + "/" + controller.limit_file[group.version - 1]).empty();
}

// The process's own groups of a controller and their parents, those with a limit file.
std::vector<Group> groups_of(Controller const& controller, std::string const& root) {
    auto const own = own_paths(controller, root);
    std::vector<Group> found;
    for (bool const whatever_is_mounted : {false, true}) {
        for (Mount const& mount : mounts_of(controller, root)) {
            auto const path = own.find(mount.version);
            // a mount of another namespace: its top is all that can be told
            if (path != own.end() && (found.empty() || !whatever_is_mounted)) {
                add_between(mount, path->second, whatever_is_mounted, found);
            }
        }
    }
    std::vector<Group> groups;
    for (Group const& group : found) {
        bool const is_new = std::find(groups.begin(), groups.end(), group) == groups.end();
        if (is_new && has_limit(group, controller)) {
            groups.push_back(group);
        }
    }
    Group const usual{root + "/sys/fs/cgroup", 2};
    if (groups.empty() && has_limit(usual, controller)) {  // nothing of /proc fits (a sandbox)
        groups.push_back(usual);
    }
    return groups;
}

}  // namespace

std::vector<MemoryLimit> memory_limits(std::string const& root, uint64_t swap_free) {
    std::vector<MemoryLimit> limits;
    for (Group const& group : groups_of(memory, root)) {
        (group.version == 2 ? add_v2 : add_v1)(group.folder, swap_free, limits);
    }
    return limits;
}

std::vector<double> cpu_quotas(std::string const& root) {
    std::vector<double> quotas;
    for (Group const& group : groups_of(cpu, root)) {
        std::vector<std::string> words;
        if (group.version == 2) {
            words = words_of(content_of(group.folder + "/cpu.max"));
        } else {
            for (char const* const name : {"/cpu.cfs_quota_us", "/cpu.cfs_period_us"}) {
                std::vector<std::string> const found = words_of(content_of(group.folder + name));
                words.push_back(found.size() == 1 ? found[0] : "");
            }
        }
        words.resize(2);
        uint64_t const quota = number(words[0]).value_or(0);
        uint64_t const period = number(words[1]).value_or(0);
        if (quota > 0 && period > 0) {
            quotas.push_back(static_cast<double>(quota) / static_cast<double>(period));
        }
    }
    return quotas;
}

}  // namespace ssd_runtime
