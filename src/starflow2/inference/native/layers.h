// Layers of both streams in float32: linear, norms, rotary positions, attention over a cache, and a stack of them.
//
// Each output of a linear layer is a sum over the inputs in one order, and each softmax a sum over the keys in one
// order, however many rows are computed together: a row has the same bits alone and in any batch.
// Letters: M new positions, C width, H heads, K head dim.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "registers.h"

// Memory of a model's weights, in the order in which they are read, for as long as the model is there. Large pages, where
// the system has them: what is read at each latent is 4,000 small ones, more than a processor remembers.
class Memory {
 public:
  // Zeros, aligned for loads of whole registers.
  float* take(size_t count) {
    const size_t bytes = (count * sizeof(float) + LINE - 1) / LINE * LINE;
    if (bytes > left) grow(bytes);
    float* found = reinterpret_cast<float*>(next);
    next += bytes, left -= bytes;
    return found;
  }

 private:
  static constexpr size_t LINE = 64, PAGE = size_t(1) << 21, PIECE = 4 * PAGE;

  struct Free {
    void operator()(char* piece) const { std::free(piece); }
  };

  void grow(size_t bytes) {
    const size_t size = std::max(PIECE, (bytes + PAGE - 1) / PAGE * PAGE);
    next = static_cast<char*>(std::aligned_alloc(PAGE, size));
    if (!next) throw std::bad_alloc();
    pieces.emplace_back(next);
#if defined(__linux__)
    madvise(next, size, MADV_HUGEPAGE);
#endif
    std::memset(next, 0, size);
    left = size;
  }

  std::vector<std::unique_ptr<char, Free>> pieces;
  char* next = nullptr;
  size_t left = 0;
};

// Tensors of a model in the order in which `weights.py` lists them.
struct Tensors {
  const float* const* next;
  Memory& memory;
  const float* take() { return *next++; }
  std::vector<float> copy(size_t count) {
    const float* from = take();
    return std::vector<float>(from, from + count);
  }
};

// ---- linear ----------------------------------------------------------------------------------------------------

constexpr int BLOCK = FLOATS * VECTORS;  // outputs that one pass over the inputs computes
constexpr int ROWS = 6;                 // rows that share such a pass: their sums fit into the registers
constexpr int PART = 64;                // inputs of one sum

// y = W x + b. Weights lie in blocks of BLOCK outputs, input after input, so that they are read once and in order.
struct Linear {
  int outputs = 0, inputs = 0, blocks = 0;
  const float *weight = nullptr, *bias = nullptr;  // (blocks, inputs, BLOCK), (blocks, BLOCK)
};

// The next matrix of a model, and its bias if it has one.
inline Linear linear_of(Tensors& tensors, int outputs, int inputs, bool has_bias = true) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
  float* weight = tensors.memory.take(size_t(blocks) * inputs * BLOCK);
  float* bias = tensors.memory.take(size_t(blocks) * BLOCK);
  const float* from = tensors.take();
  for (int o = 0; o < outputs; o++)
    for (int i = 0; i < inputs; i++)
      weight[(size_t(o / BLOCK) * inputs + i) * BLOCK + o % BLOCK] = from[size_t(o) * inputs + i];
  if (has_bias) std::memcpy(bias, tensors.take(), outputs * sizeof(float));
  return {outputs, inputs, blocks, weight, bias};
}

// V registers of outputs, from the start of a block on, of R rows, in parts of PART inputs that are summed apart: that
// rounds less than one long sum. x: (R, inputs), y: (R, outputs).
template <int R, int V>
void linear_block(const Linear& layer, int block, const float* x, float* y) {
  Vec totals[R][V];
  const float* w = layer.weight + size_t(block) * layer.inputs * BLOCK;
  const float* b = layer.bias + block * BLOCK;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) totals[r][v] = load(b + v * FLOATS);
  for (int first = 0; first < layer.inputs; first += PART) {
    Vec sums[R][V] = {};
    const int end = std::min(first + PART, layer.inputs);
    for (int i = first; i < end; i++, w += BLOCK)
      for (int v = 0; v < V; v++) {
        const Vec column = load(w + v * FLOATS);
        for (int r = 0; r < R; r++) sums[r][v] = multiply_add(all(x[r * layer.inputs + i]), column, sums[r][v]);
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) totals[r][v] += sums[r][v];
  }
  const int count = std::min(V * FLOATS, layer.outputs - block * BLOCK);
  for (int r = 0; r < R; r++) std::memcpy(y + r * layer.outputs + block * BLOCK, totals[r], count * sizeof(float));
}

using LinearBlock = decltype(&linear_block<1, 1>);

template <int V>
inline constexpr LinearBlock ROW_BLOCKS[] = {linear_block<1, V>, linear_block<2, V>, linear_block<3, V>,
                                             linear_block<4, V>, linear_block<5, V>, linear_block<6, V>};
static_assert(sizeof ROW_BLOCKS<1> / sizeof(LinearBlock) == ROWS);

// The kernels for 1 to ROWS rows of a block of which `vectors` registers hold outputs.
inline const LinearBlock* row_blocks(int vectors) {
  switch (vectors) {
    case 1: return ROW_BLOCKS<1>;
    case 2: return ROW_BLOCKS<2>;
    case 3: return ROW_BLOCKS<std::min(3, VECTORS)>;
    default: return ROW_BLOCKS<VECTORS>;
  }
}

// x: (rows, inputs) -> y: (rows, outputs)
inline void linear(const Linear& layer, const float* x, float* y, int rows) {
  const int passes = (rows + ROWS - 1) / ROWS;  // over rows, of nearly as many each: a short one costs as much
  for (int block = 0; block < layer.blocks; block++) {
    const int vectors = (std::min(BLOCK, layer.outputs - block * BLOCK) + FLOATS - 1) / FLOATS;
    const LinearBlock* kernels = row_blocks(vectors);
    for (int pass = 0, r = 0; pass < passes; pass++) {
      const int count = rows * (pass + 1) / passes - r;
      kernels[count - 1](layer, block, x + size_t(r) * layer.inputs, y + size_t(r) * layer.outputs);
      r += count;
    }
  }
}

inline void add(float* x, const float* y, size_t count) {
  for (size_t i = 0; i < count; i++) x[i] += y[i];
}

// ---- norms and activations -------------------------------------------------------------------------------------

// Layer norm, or RMS norm without a mean and bias, with weights as they are multiplied.
struct Norm {
  bool is_rms = false;
  float eps = 0;
  std::vector<float> weight, bias;  // (C,)
};

inline Norm layer_norm(Tensors& tensors, int width) {
  std::vector<float> weight = tensors.copy(width);
  return Norm{false, 1e-5f, weight, tensors.copy(width)};
}

inline Norm rms_norm(Tensors& tensors, int width) {
  return Norm{true, 1e-6f, tensors.copy(width), std::vector<float>(width, 0.0f)};
}

// x, y: (rows, C); C is a multiple of FLOATS
inline void apply(const Norm& norm, const float* x, float* y, int rows) {
  const int width = int(norm.weight.size());
  for (int r = 0; r < rows; r++, x += width, y += width) {
    Vec total{}, squares{};
    if (!norm.is_rms)
      for (int i = 0; i < width; i += FLOATS) total += load(x + i);
    const Vec mean = all(norm.is_rms ? 0.0f : sum(total) / width);
    for (int i = 0; i < width; i += FLOATS) {
      const Vec d = load(x + i) - mean;
      squares = multiply_add(d, d, squares);
    }
    const Vec factor = all(1.0f / std::sqrt(sum(squares) / width + norm.eps));
    for (int i = 0; i < width; i += FLOATS)
      store(y + i, multiply_add((load(x + i) - mean) * factor, load(&norm.weight[i]), load(&norm.bias[i])));
  }
}

inline Vec silu(Vec x) { return x / (all(1.0f) + exponential(-x)); }

inline void squared_relu(float* x, size_t count) {
  for (size_t i = 0; i < count; i++) x[i] = x[i] < 0 ? 0 : x[i] * x[i];
}

// silu(gate) * up. x: (rows, 2 * width), gates first -> y: (rows, width)
inline void gated(const float* x, float* y, int rows, int width) {
  for (int r = 0; r < rows; r++, x += 2 * width, y += width)
    for (int i = 0; i < width; i += FLOATS) store(y + i, silu(load(x + i)) * load(x + width + i));
}

// ---- rotation and attention ------------------------------------------------------------------------------------

// Turn the pairs (2 p, 2 p + 1) of a head (K,) in place. rotation: (K / 2, 2), cosine and sine of each pair.
inline void rotate(const float* rotation, float* head, int K) {
  for (int p = 0; p < K; p += 2) {
    const float x = head[p], y = head[p + 1], cos = rotation[p], sin = rotation[p + 1];
    head[p] = x * cos - y * sin;
    head[p + 1] = x * sin + y * cos;
  }
}

// Keys and values (count, K) that one head of one position attends to.
struct Past {
  const float *keys, *values;
  int count;
};

constexpr int AHEAD = 48;  // positions that are asked for before they are needed; from there the processor goes on itself

// Ask for a row of K floats to be brought near while something else is computed.
template <int K>
void fetch(const float* row) {
  for (int i = 0; i < K; i += FLOATS) __builtin_prefetch(row + i, 0, 2);
}

// One query (K,) over its past. next: what is attended to after it, which comes from far and is fetched meanwhile.
// scores: room for `count` floats and a register more.
template <int K>
void attend(const float* query, const Past& past, const Past& next, float* scores, float* out) {
  constexpr int PARTS = K / FLOATS;
  const float *keys = past.keys, *values = past.values;
  const int count = past.count, ahead = std::min(next.count, AHEAD);
  const Vec scale = all(1.0f / std::sqrt(float(K)));
  Vec q[PARTS];
  for (int i = 0; i < PARTS; i++) q[i] = load(query + i * FLOATS) * scale;
  for (int j = 0; j < count; j++) {
    if (j < ahead) fetch<K>(next.keys + j * K);
    Vec products = q[0] * load(keys + j * K);
    for (int i = 1; i < PARTS; i++) products = multiply_add(q[i], load(keys + j * K + i * FLOATS), products);
    scores[j] = sum(products);
  }
  const int end = (count + FLOATS - 1) / FLOATS * FLOATS;
  std::fill(scores + count, scores + end, -1e30f);  // e to the power of it is nothing beside the largest, which is 1
  Vec most = load(scores), total{};
  for (int j = FLOATS; j < end; j += FLOATS) most = larger(most, load(scores + j));
  const Vec top = all(largest(most));
  for (int j = 0; j < end; j += FLOATS) {
    const Vec e = exponential(load(scores + j) - top);
    store(scores + j, e);
    total += e;
  }
  Vec even[PARTS] = {}, odd[PARTS] = {};  // two sums: the next need not wait for the last
  for (int j = 0; j < count; j += 2) {
    if (j < ahead) fetch<K>(next.values + j * K), fetch<K>(next.values + (j + 1) * K);
    for (int i = 0; i < PARTS; i++) {
      even[i] = multiply_add(all(scores[j]), load(values + j * K + i * FLOATS), even[i]);
      if (j + 1 < count) odd[i] = multiply_add(all(scores[j + 1]), load(values + (j + 1) * K + i * FLOATS), odd[i]);
    }
  }
  const Vec share = all(1.0f / sum(total));
  for (int i = 0; i < PARTS; i++) store(out + i * FLOATS, (even[i] + odd[i]) * share);
}

using Attend = decltype(&attend<64>);

// The attention for a head dim, null for one that is not compiled (`backend.HEAD_DIMS` lists them).
inline Attend attend_for(int head_dim) {
  switch (head_dim) {
    case 16: return attend<16>;
    case 32: return attend<32>;
    case 48: return attend<48>;
    case 64: return attend<64>;
    case 96: return attend<96>;
    case 128: return attend<128>;
    default: return nullptr;
  }
}

// ---- the stack -------------------------------------------------------------------------------------------------

// Keys and values of a stack, (layers, 2, lanes, heads, capacity, K), in memory that the caller owns.
struct Cache {
  float* values;
  int64_t layer, side, lane, head;  // strides in floats; side: from keys to values
};

// A new position: the lane and the place in it where its keys and values go, and its rotation (K / 2, 2), null for none.
struct Place {
  int64_t lane, at;
  const float* rotation;
};

struct Layer {
  Norm before_attention, before_mlp;
  Linear qkv, out, up, down;
};

// A pre-norm transformer. is_language: Qwen's layers (RMS norms, gated MLP); else the flow's (layer norms, relu^2).
struct Stack {
  int width, heads, kv_heads, head_dim, mlp_width;
  bool is_language;
  std::vector<Layer> layers;
  Norm last;
  Attend attend;
  bool is_causal = true;  // else all positions of a pass, which are a whole lane, attend to each other
};

inline Layer layer_of(Tensors& t, const Stack& s) {
  Layer layer;
  auto norm = [&] { return s.is_language ? rms_norm(t, s.width) : layer_norm(t, s.width); };
  layer.before_attention = norm();
  layer.qkv = linear_of(t, (s.heads + 2 * s.kv_heads) * s.head_dim, s.width);
  layer.out = linear_of(t, s.width, s.heads * s.head_dim, !s.is_language);
  layer.before_mlp = norm();
  layer.up = linear_of(t, (s.is_language ? 2 : 1) * s.mlp_width, s.width, !s.is_language);
  layer.down = linear_of(t, s.width, s.mlp_width, !s.is_language);
  return layer;
}

// sizes: width, layers, heads, key-value heads, head dim, MLP width
inline Stack stack_of(Tensors& t, const int32_t* sizes, bool is_language) {
  Stack s{sizes[0], sizes[2], sizes[3], sizes[4], sizes[5], is_language, {}, {}, attend_for(sizes[4])};
  for (int i = 0; i < sizes[1]; i++) s.layers.push_back(layer_of(t, s));
  s.last = rms_norm(t, s.width);
  return s;
}

// Memory of a pass, kept from one to the next.
struct Scratch {
  std::vector<float> normed, qkv, heads, hidden, gates, added, scores;
};

// Self-attention of M places in one layer: keys and values are written first, then each place attends up to itself.
inline void attention(const Stack& s, int layer, const Cache& cache, const Place* places, int M, Scratch& scratch) {
  const int K = s.head_dim, width = (s.heads + 2 * s.kv_heads) * K;
  float* keys = cache.values + layer * cache.layer;
  for (int m = 0; m < M; m++) {
    float* q = &scratch.qkv[size_t(m) * width];
    for (int head = 0; head < s.heads + s.kv_heads && places[m].rotation; head++)
      rotate(places[m].rotation, q + head * K, K);
    for (int head = 0; head < s.kv_heads; head++) {
      float* to = keys + places[m].lane * cache.lane + head * cache.head + places[m].at * K;
      std::memcpy(to, q + (s.heads + head) * K, K * sizeof(float));
      std::memcpy(to + cache.side, q + (s.heads + s.kv_heads + head) * K, K * sizeof(float));
    }
  }
  auto past_of = [&](int m, int head) {
    const float* from = keys + places[m].lane * cache.lane + head / (s.heads / s.kv_heads) * cache.head;
    return Past{from, from + cache.side, s.is_causal ? int(places[m].at) + 1 : M};
  };
  Past past = past_of(0, 0);
  for (int m = 0; m < M; m++)
    for (int head = 0; head < s.heads; head++) {
      const int after = head + 1 < s.heads ? m : m + 1;
      const Past next = after < M ? past_of(after, (head + 1) % s.heads) : Past{};
      s.attend(&scratch.qkv[size_t(m) * width + head * K], past, next.keys == past.keys ? Past{} : next,
               scratch.scores.data(), &scratch.heads[(size_t(m) * s.heads + head) * K]);
      past = next;
    }
}

inline void mlp(const Stack& s, const Layer& layer, int M, Scratch& scratch) {
  linear(layer.up, scratch.normed.data(), scratch.hidden.data(), M);
  if (s.is_language) {
    gated(scratch.hidden.data(), scratch.gates.data(), M, s.mlp_width);
    linear(layer.down, scratch.gates.data(), scratch.added.data(), M);
  } else {
    squared_relu(scratch.hidden.data(), size_t(M) * s.mlp_width);
    linear(layer.down, scratch.hidden.data(), scratch.added.data(), M);
  }
}

inline void resize(const Stack& s, const Place* places, int M, Scratch& scratch) {
  const size_t rows = M;
  int64_t length = 0;
  for (int m = 0; m < M; m++) length = std::max(length, places[m].at + 1);
  scratch.normed.resize(rows * s.width);
  scratch.qkv.resize(rows * (s.heads + 2 * s.kv_heads) * s.head_dim);
  scratch.heads.resize(rows * s.heads * s.head_dim);
  scratch.hidden.resize(rows * 2 * s.mlp_width);
  scratch.gates.resize(rows * s.mlp_width);
  scratch.added.resize(rows * s.width);
  scratch.scores.resize(length + FLOATS);
}

// Run the stack over M new places; those of one lane come in order. x: (M, C), overwritten -> out: (M, C).
inline void run(const Stack& s, float* x, const Place* places, int M, const Cache& cache, Scratch& scratch, float* out) {
  resize(s, places, M, scratch);
  for (size_t i = 0; i < s.layers.size(); i++) {
    const Layer& layer = s.layers[i];
    apply(layer.before_attention, x, scratch.normed.data(), M);
    linear(layer.qkv, scratch.normed.data(), scratch.qkv.data(), M);
    attention(s, int(i), cache, places, M, scratch);
    linear(layer.out, scratch.heads.data(), scratch.added.data(), M);
    add(x, scratch.added.data(), size_t(M) * s.width);
    apply(layer.before_mlp, x, scratch.normed.data(), M);
    mlp(s, layer, M, scratch);
    add(x, scratch.added.data(), size_t(M) * s.width);
  }
  apply(s.last, x, out, M);
}
