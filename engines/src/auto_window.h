#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.h"

namespace ssd_runtime {

// Bytes of the weights that a step multiplies by, and how many less the operators of ../operators
// read of them: half of float32 matrices that came in two bytes a number.
struct WeightBytes {
    uint64_t read = 0, packed = 0;
};

// From the header of a weights file. name, bundle: for messages. Throws Failure SSD_BAD_BUNDLE for
// a damaged one.
WeightBytes weight_bytes(std::string_view file, std::string const& name, std::string const& bundle);

// Float operations of a decode step of one image.
double step_operations(Config const& config);

// Seconds of a decode step and of a pass over several steps, from bytes and operations
// (ssd_export/plan/lookahead.py has the model and its reasons).
struct PassCost {
    double overhead, moving, computing;
    int64_t fixed;    // tokens that a pass computes whatever its window; 0 where it has no more
    double opening;   // decode steps that going from single steps to passes takes, or back
    double saved;     // by operators that single steps have and a pass has not
    double evicting;  // of each token, where passes evict by graphs and single steps do not

    // Of one image. cpu_threads: that a step computes with; 0: a GPU does. opens_again: whether
    // one graph is open at a time. fuses_steps: whether steps have the operators of ../operators.
    static PassCost of(Bundle const& bundle, int cpu_threads, int64_t fixed, bool opens_again,
                       bool fuses_steps);

    double step() const { return overhead + moving + computing - saved; }
    double of_window(int64_t window) const;
    // To choose from.
    std::vector<int64_t> windows() const;
};

// The window that pays best for one image, chosen anew as drafts turn out right or wrong. It begins
// with single steps.
class AutoWindow {
public:
    static constexpr int64_t off = 1;

    // rooms: as PolicyTable::rooms.
    AutoWindow(PassCost cost, std::vector<int64_t> rooms) : cost_(cost), rooms_(std::move(rooms)) {}

    // The most tokens of a pass.
    int64_t widest() const { return cost_.windows().back(); }
    // Tokens of the pass from a step on; off for a single step.
    int64_t at(int64_t step);
    // Whether some window pays where every draft is right.
    bool could_pay() const { return choose(1.0).saved > cost_.opening; }
    // Takes how the drafts of a pass turned out, up to the first wrong one.
    void drafts(int64_t right, bool then_wrong);

private:
    struct Choice {
        int64_t window;
        double saved;  // single steps' time of an image; less than 0 where it has to save more
    };
    Choice choose(double share) const;

    PassCost cost_;
    std::vector<int64_t> rooms_;
    double share_ = 0.3;   // of how often a draft is right: a first guess
    int64_t counted_ = 4;  // drafts behind the share
    int64_t window_ = off;
    std::map<int64_t, Choice> best_;
};

}  // namespace ssd_runtime
