#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "bundle.h"

namespace ssd_runtime {

// Seconds of a decode step and of a pass over several steps, from bytes and operations
// (ssd_export/plan/lookahead.py has the model and its reasons).
struct PassCost {
    double overhead, moving, computing;

    // Of one image. cpu_threads: that a step computes with; 0: a GPU does.
    static PassCost of(Bundle const& bundle, int cpu_threads);

    double step() const { return overhead + moving + computing; }
    double of_window(int64_t window) const;
};

// The window that pays best for one image, chosen anew as drafts turn out right or wrong.
class AutoWindow {
public:
    static constexpr int64_t off = 1, widest = 24;

    // rooms: as PolicyTable::rooms.
    AutoWindow(PassCost cost, std::vector<int64_t> rooms) : cost_(cost), rooms_(std::move(rooms)) {}

    // Tokens of the next pass; off for a single step.
    int64_t next();
    // Whether some window pays where every draft is right.
    bool could_pay() const { return choose(1.0) != off; }
    // Takes how the drafts of a pass turned out, up to the first wrong one.
    void drafts(int64_t right, bool then_wrong);

private:
    int64_t choose(double share) const;

    PassCost cost_;
    std::vector<int64_t> rooms_;
    double share_ = 0.85;  // of how often a draft is right: a first guess
    std::map<int64_t, int64_t> best_;
};

}  // namespace ssd_runtime
