// What changes from run to run of a program, kept so that the next run can be prepared while one is under way.
//
//     staged   the caller's arrays, written before each run
//     held     a copy of their rows, taken when the run is asked for
//     live     what the recorded instructions read; filled from `held` when the run begins
//
// A run may follow the one before it: input tokens that were not known when it was asked for are rows of what that run drew.
#pragma once
#include <stdint.h>
#include <string.h>
#include <string>
#include <vector>

namespace pg {

class Feed {
   public:
    // A run between being asked for and being looked at.
    struct Held {
        std::vector<char> inputs;
        std::vector<int32_t> drawn;
        int64_t rows[4] = {0, 0, 0, 0};
        int64_t ticket = 0, nanoseconds = 0;
        std::string wrong;
    };

    // An array with as many rows as `symbol` says at each run, and `more` of them.
    void add(void* live, const void* staged, int64_t row_bytes, int32_t symbol, int64_t more) {
        inputs_.push_back({static_cast<char*>(live), static_cast<const char*>(staged), row_bytes, symbol, more});
    }

    // Before each run tokens[i] becomes drawn[source[i]] wherever source[i] >= 0, for the T tokens. `drawn` has R rows.
    void follow(int32_t* tokens, const int32_t* source, const int32_t* drawn) { tokens_ = tokens, source_ = source, drawn_ = drawn; }

    void hold(Held& held, const int64_t rows_of[4]) const {
        memcpy(held.rows, rows_of, sizeof held.rows);
        int64_t need = 0;
        for (const Input& in : inputs_) need += in.bytes(rows_of);
        held.inputs.resize(size_t(need));
        char* to = held.inputs.data();
        for (const Input& in : inputs_) {
            memcpy(to, in.staged, size_t(in.bytes(rows_of)));
            to += in.bytes(rows_of);
        }
    }

    void begin(const Held& held) const {
        const char* from = held.inputs.data();
        for (const Input& in : inputs_) {
            memcpy(in.live, from, size_t(in.bytes(held.rows)));
            from += in.bytes(held.rows);
        }
        if (tokens_)
            for (int64_t i = 0; i < held.rows[1]; ++i)   // a row that could not be drawn is -1: its run ends with an error, this one must not
                if (source_[i] >= 0) tokens_[i] = drawn_[source_[i]] < 0 ? 0 : drawn_[source_[i]];
    }

    void end(Held& held) const {
        if (drawn_) held.drawn.assign(drawn_, drawn_ + held.rows[3]);
    }

   private:
    struct Input {
        char* live;
        const char* staged;
        int64_t row_bytes;
        int32_t symbol;
        int64_t more;
        int64_t bytes(const int64_t rows_of[4]) const { return (rows_of[symbol] + more) * row_bytes; }
    };

    std::vector<Input> inputs_;
    int32_t* tokens_ = nullptr;
    const int32_t* source_ = nullptr;
    const int32_t* drawn_ = nullptr;
};

}  // namespace pg
