#include "program.h"

#include <stdlib.h>
#include <time.h>
#include <algorithm>
#include <string>

#include "ops.h"

namespace pg {

void FreeDeleter::operator()(void* p) const { free(p); }

Bytes allocate(int64_t bytes) {
    return Bytes(static_cast<char*>(aligned_alloc(64, size_t(round_up(bytes < 64 ? 64 : bytes, 64)))));
}

static int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

enum Opcode {
#define PG_CODE(name, tensors, domain) kOp_##name,
    PG_OPS(PG_CODE)
#undef PG_CODE
        kNumOps
};

int opcode_of_mark() { return kOp_mark; }

std::string Sequence::load(const pg_instruction* code, int64_t count, const Op* ops, int num_threads) {
    has_rows_ = false;
    code_.assign(code, code + count);
    calls_.assign(size_t(count), Call{});
    tickets_.reset(new std::atomic<int64_t>[size_t(count) * kMaxPhases]);
    int64_t need = 0;
    for (int64_t k = 0; k < count; ++k) {
        const pg_instruction& in = code_[size_t(k)];
        std::string where = "instruction " + std::to_string(k) + ": ";
        if (in.opcode < 0 || in.opcode >= kNumOps) return where + "unknown opcode " + std::to_string(in.opcode);
        for (const pg_tensor& t : in.t)
            if (t.symbol < PG_FIXED || t.symbol > PG_R || t.rows < 0) return where + "a tensor has bad rows";
        const Op& op = ops[in.opcode];
        Call& c = calls_[size_t(k)];
        c = Call{in.t, in.i, in.f, nullptr, &tickets_[size_t(k) * kMaxPhases], &fault_, 0};
        c.rows = op.domain < 0 ? 0 : in.t[op.domain].rows;
        if (const char* wrong = op.check(c)) return where + wrong;
        int64_t bytes = op.scratch(c, num_threads);
        need = bytes > need ? bytes : need;
    }
    if (need > scratch_bytes_ || !scratch_) {
        scratch_ = allocate(need);
        if (!scratch_) return "no memory for " + std::to_string(need) + " bytes of scratch";
        scratch_bytes_ = need;
    }
    for (Call& c : calls_) c.scratch = scratch_.get();
    return {};
}

std::string Sequence::run(Pool& pool, const Op* ops, const int64_t rows_of[4], Progress* progress, const std::function<void()>* opened) {
    for (size_t k = 0; k < code_.size() * kMaxPhases; ++k) tickets_[k].store(0, std::memory_order_relaxed);
    fault_.store(nullptr);
    progress_ = progress;
    if (!(has_rows_ && rows_of && ops == ops_ && std::equal(rows_of, rows_of + 4, rows_))) set_rows(ops, rows_of);
    plan(ops, pool.size());   // always: phases may depend on what operands hold, as on the lengths of sequences
    if (tracing_) {
        num_began_ = stage_end_.size() + 1;
        began_.reset(new std::atomic<int64_t>[num_began_]);
        for (size_t k = 0; k < num_began_; ++k) began_[k].store(0, std::memory_order_relaxed);
    }
    pool.run(&Sequence::job, this, int(stage_end_.size()), opened);
    if (tracing_) began_[num_began_ - 1].store(now_ns());
    const char* fault = fault_.load();
    return fault ? fault : std::string();
}

void Sequence::set_rows(const Op* ops, const int64_t rows_of[4]) {
    for (size_t k = 0; k < code_.size(); ++k) {
        pg_instruction& in = code_[k];
        int domain = ops[in.opcode].domain;
        if (rows_of)
            for (pg_tensor& t : in.t)
                if (t.symbol != PG_FIXED) t.rows = rows_of[t.symbol];
        calls_[k].rows = domain < 0 ? 0 : in.t[domain].rows;
    }
    ops_ = ops;
    has_rows_ = rows_of != nullptr;
    if (rows_of) std::copy(rows_of, rows_of + 4, rows_);
}

int64_t Sequence::times(int64_t* nanoseconds, int32_t* instructions, int64_t most) const {
    for (size_t k = 0; k < num_began_ && int64_t(k) < most; ++k) {
        nanoseconds[k] = began_[k].load();
        instructions[k] = k + 1 == num_began_ ? -1 : int32_t(items_[k ? stage_end_[k - 1] : 0].instruction);
    }
    return int64_t(num_began_);
}

// Cuts the run into stages: one ends at every barrier and between the phases of an instruction.
void Sequence::plan(const Op* ops, int num_threads) {
    items_.clear();
    stage_end_.clear();
    for (size_t k = 0; k < code_.size(); ++k) {
        int phases = ops[code_[k].opcode].phases(calls_[k], num_threads);
        for (int p = 0; p < phases; ++p) {
            items_.push_back({uint32_t(k), uint32_t(p)});
            if (p + 1 < phases || code_[k].barrier) stage_end_.push_back(uint32_t(items_.size()));
        }
    }
    if (stage_end_.empty() || stage_end_.back() != items_.size()) stage_end_.push_back(uint32_t(items_.size()));
}

void Sequence::job(void* self, int stage, int tid, int num_threads) {
    static_cast<Sequence*>(self)->step(stage, tid, num_threads);
}

void Sequence::step(int stage, int tid, int num_threads) {
    if (tracing_) {
        int64_t never = 0;
        began_[size_t(stage)].compare_exchange_strong(never, now_ns());
    }
    for (uint32_t at = stage ? stage_end_[size_t(stage) - 1] : 0; at < stage_end_[size_t(stage)]; ++at) {
        const Item item = items_[at];
        Call c = calls_[item.instruction];
        c.ticket += item.phase;
        if (code_[item.instruction].opcode == kOp_mark) {
            if (c.ticket->fetch_add(1) == 0 && progress_) {
                progress_->marks.fetch_add(1);
                progress_->marks.notify_all();
            }
        } else {
            ops_[code_[item.instruction].opcode].run(c, int(item.phase), tid, num_threads);
        }
    }
}

}  // namespace pg
