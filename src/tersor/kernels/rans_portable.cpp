// Rows of an entropy-coded stream without any particular instructions, and what all loops share.
#include "rans.h"

namespace tersor_rans {

void group_portable(Reader& in, size_t r, size_t first, size_t count, int32_t* codes) {
    const Contexts& contexts = in.contexts;
    int32_t index[LANES];
    uint8_t low[LANES];
    uint32_t escaped = 0;
    for (size_t l = 0; l < count; ++l) {
        const uint32_t kind = static_cast<uint32_t>(contexts.at(r, first + l)), slot = in.x[l] & (TOTAL - 1);
        const uint32_t found = in.entries[((kind * 2 + (in.path[first + l] & 1u)) << TOTAL_BITS) + slot];
        in.x[l] = (found >> TOTAL_BITS & 0x1fff) * (in.x[l] >> TOTAL_BITS) + (found & (TOTAL - 1));
        in.refill(in.x[l]);
        index[l] = static_cast<int32_t>(found) >> 25;
        escaped |= static_cast<uint32_t>(index[l] == ESCAPE) << l;
        low[l] = in.low[kind];
    }
    if (in.raw)
        for (size_t l = 0; l < count; ++l)
            if (low[l] && index[l] != ESCAPE)
                index[l] = index[l] * (1 << low[l]) + static_cast<int32_t>(in.take(in.x[l], low[l]));
    if (escaped) escapes(in, escaped, index);
    for (size_t l = 0; l < count; ++l) {
        const uint32_t path = in.path[first + l], u = path & 1u;
        codes[first + l] = 2 * index[l] + static_cast<int32_t>(u);
        in.next[first + l] = static_cast<uint8_t>((path >> 1) ^ (u ? in.h0 : 0u) ^ (index[l] & 1 ? in.h1 : 0u));
    }
}

const Kinds& Reader::of_row(size_t row) {
    constexpr int32_t KEPT = 256;
    const int32_t level = contexts.row[row];
    if (kinds.empty()) kinds.resize(KEPT + 1);
    const bool kept = level >= 0 && level < KEPT;
    Kinds& found = kinds[kept ? level : KEPT];
    if (kept && !found.twice.empty()) return found;
    found.twice.assign(columns + BEYOND, 0);
    found.low.assign(columns + BEYOND, 0);
    found.raw = false;
    for (size_t c = 0; c < columns; ++c) {
        const int kind = contexts.at(row, c);
        found.twice[c] = static_cast<uint8_t>(2 * kind);
        found.low[c] = low[kind];
        found.raw |= low[kind] > 0;
    }
    return found;
}

namespace {

// What a state becomes that is too small gets a word. Without branches: it is too small now and then, and no rule says when.
inline void refill(uint32_t& x, bool may, const uint8_t*& at) {
    const uint32_t small = static_cast<uint32_t>(may) & static_cast<uint32_t>(x < LEAST);
    const uint32_t word = at[0] | static_cast<uint32_t>(at[1]) << 8;
    x = x << (small << 4) | (word & (0u - small));
    at += small << 1;
}

// As group_portable, where the stream is far from its end.
template <bool raw>
void group_far(Reader& in, const Kinds& kinds, const uint8_t* step, size_t first, size_t count, int32_t* codes) {
    const uint8_t *at = in.at, *const twice = kinds.twice.data() + first, *const path = in.path.data() + first;
    uint8_t number[LANES];
    uint32_t escaped = 0;
    for (size_t l = 0; l < count; ++l) {
        const uint32_t union_ = path[l] & 1u, x = in.x[l];
        const uint32_t found = in.entries[((twice[l] | union_) << TOTAL_BITS) + (x & (TOTAL - 1))];
        uint32_t next = (found >> TOTAL_BITS & 0x1fff) * (x >> TOTAL_BITS) + (found & (TOTAL - 1));
        refill(next, true, at);
        in.x[l] = next;
        number[l] = static_cast<uint8_t>((found >> 24 & 0xfe) | union_);
        codes[first + l] = static_cast<int8_t>(number[l]);
        escaped |= static_cast<uint32_t>(codes[first + l] < ESCAPE) << l;
    }
    if (raw)
        for (size_t l = 0; l < count; ++l) {
            const int low = escaped >> l & 1 ? 0 : kinds.low[first + l], shift = TOTAL_BITS - low;
            const uint32_t x = in.x[l], slot = x & (TOTAL - 1), value = slot >> shift;
            uint32_t next = (x >> TOTAL_BITS << shift) + (slot & ((1u << shift) - 1));
            refill(next, low > 0, at);
            in.x[l] = next;
            codes[first + l] = (codes[first + l] & ~1) * (1 << low) + static_cast<int32_t>(2 * value) + (codes[first + l] & 1);
            number[l] = static_cast<uint8_t>(codes[first + l]);
        }
    in.at = at;
    uint8_t* const next = in.next.data() + first;
    const uint32_t turn = in.h1;
    for (size_t l = 0; l < count; ++l)
        next[l] = static_cast<uint8_t>(step[path[l]] ^ (turn & (0u - (number[l] >> 1 & 1u))));
    if (escaped) settle(in, first, escaped, codes);
}

}  // namespace

void row_portable(Reader& in, size_t r, int32_t* codes) {
    const bool few = in.contexts.last < 64;
    uint8_t step[256];
    for (uint32_t p = 0; p < 256; ++p) step[p] = static_cast<uint8_t>((p >> 1) ^ (p & 1 ? in.h0 : 0u));
    const Kinds* kinds = few ? &in.of_row(r) : nullptr;
    for (size_t first = 0; first < in.columns; first += in.lanes) {
        const size_t count = std::min(in.lanes, in.columns - first);
        if (!few || in.end - in.at < FAR)
            group_portable(in, r, first, count, codes);
        else if (kinds->raw)
            group_far<true>(in, *kinds, step, first, count, codes);
        else
            group_far<false>(in, *kinds, step, first, count, codes);
    }
}

TERSOR_CLONES void inward_portable(const Contexts& contexts, const Shrink& shrink, size_t r, size_t columns,
                                   int32_t* codes) {
    const int32_t own = contexts.row[r], shift = contexts.shift, last = contexts.last, *level = contexts.level.data();
    const int32_t* by = &shrink.wide[0][0];
    for (size_t c = 0; c < columns; ++c) {
        const int32_t k = codes[c], size = std::min(k < 0 ? -k : k, 4);
        const int32_t kind = std::min(std::max((own + level[c]) >> shift, 0), last);
        codes[c] = k * 256 + (static_cast<int32_t>(k < 0) - static_cast<int32_t>(k > 0)) * by[size * 64 + kind];
    }
}

}  // namespace tersor_rans
