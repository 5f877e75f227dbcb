// The decoders of a feature auto-encoder in float32: latents to features to pixels, one image at a time.
//
// The twin of `models/fae.py:Fae.decode` for the configs that `pixels.py` takes. Convolutions are linear layers over rows
// that hold what a pixel sees of the image below.
// Letters: N latents, D latent dim, C channels, H x W height and width.
#pragma once

#include "layers.h"

// A transformer over all N positions at once, with learned positions.
struct Tower {
  Linear in;
  const float* positions;  // (N, C)
  Stack body;
};

struct Upsample {
  Linear expand;  // outputs in the order (2, 2, C): a square of four pixels, line by line
  bool mixes;
  Linear mix;  // inputs in the order (3, 3, C)
};

struct Decoder {
  Memory memory;
  int rows, columns, dim, step;
  Tower features, pixels;
  Linear feature_head;
  std::vector<Upsample> upsamples;
  Linear out;  // sees 3 x 3 pixels, or one where a position of its input draws a square of step x step > 1
};

// An image (H + 2, W + 2, C) with a border of zeros.
struct Frame {
  int height, width, channels;
  std::vector<float> values;

  Frame(int height, int width, int channels)
      : height(height), width(width), channels(channels), values(size_t(height + 2) * (width + 2) * channels) {}

  float* at(int y, int x) { return &values[(size_t(y + 1) * (width + 2) + x + 1) * channels]; }
};

inline Tower tower_of(Tensors& t, const int32_t* sizes, int positions, int inputs) {
  Tower tower;
  tower.in = linear_of(t, sizes[0], inputs);
  float* table = t.memory.take(size_t(positions) * sizes[0]);
  std::memcpy(table, t.take(), size_t(positions) * sizes[0] * sizeof(float));
  tower.positions = table;
  tower.body = stack_of(t, sizes, false);
  tower.body.is_causal = false;
  return tower;
}

// sizes: as `starflow_decoder_create` takes them
inline void decoder_of(Tensors& t, const int32_t* sizes, int upsamples, const int32_t* channels, Decoder& d) {
  d.rows = sizes[0], d.columns = sizes[1], d.dim = sizes[2], d.step = sizes[3];
  const int features = sizes[4], positions = d.rows * d.columns;
  d.features = tower_of(t, sizes + 5, positions, d.dim);
  d.feature_head = linear_of(t, features, d.features.body.width);
  d.pixels = tower_of(t, sizes + 11, positions, features);
  int below = d.pixels.body.width;
  for (int i = 0; i < upsamples; i++) {
    Upsample up{linear_of(t, 4 * channels[i], below), i + 1 < upsamples, {}};
    if (up.mixes) up.mix = linear_of(t, channels[i], 9 * channels[i]);
    d.upsamples.push_back(up);
    below = channels[i];
  }
  d.out = linear_of(t, 3 * d.step * d.step, (d.step == 1 ? 9 : 1) * below);
}

// x: (N, inputs) -> out: (N, C)
inline void run_tower(const Tower& tower, const float* x, int N, Scratch& scratch, float* out) {
  const Stack& s = tower.body;
  std::vector<float> e(size_t(N) * s.width), cached(s.layers.size() * 2 * N * s.kv_heads * s.head_dim);
  std::vector<Place> places;
  for (int n = 0; n < N; n++) places.push_back({0, n, nullptr});
  const int64_t head = int64_t(N) * s.head_dim, side = head * s.kv_heads;
  linear(tower.in, x, e.data(), N);
  add(e.data(), tower.positions, e.size());
  run(s, e.data(), places.data(), N, Cache{cached.data(), 2 * side, side, side, head}, scratch, out);
}

inline Frame without_negatives(const Frame& frame) {
  Frame out = frame;
  for (float& x : out.values) x = x < 0 ? 0 : x;
  return out;
}

// What each pixel of line y sees: (W, 9 C), or (W, C) without its neighbours.
inline const float* seen(Frame& frame, int y, bool has_neighbours, std::vector<float>& rows) {
  if (!has_neighbours) return frame.at(y, 0);
  const size_t part = size_t(3) * frame.channels;
  rows.resize(frame.width * 3 * part);
  float* to = rows.data();
  for (int x = 0; x < frame.width; x++)
    for (int line = y - 1; line <= y + 1; line++, to += part)
      std::memcpy(to, frame.at(line, x - 1), part * sizeof(float));
  return rows.data();
}

// Twice the height and width.
inline Frame upsampled(const Upsample& up, Frame& below) {
  const int channels = up.expand.outputs / 4, width = 2 * below.width;
  Frame frame(2 * below.height, width, channels);
  std::vector<float> line(size_t(width) * 2 * channels), rows;
  for (int y = 0; y < below.height; y++) {
    linear(up.expand, below.at(y, 0), line.data(), below.width);
    for (int x = 0; x < below.width; x++)
      for (int lower = 0; lower < 2; lower++)
        std::memcpy(frame.at(2 * y + lower, 2 * x), &line[(size_t(x) * 4 + lower * 2) * channels],
                    2 * channels * sizeof(float));
  }
  if (!up.mixes) return frame;
  Frame positive = without_negatives(frame);
  for (int y = 0; y < frame.height; y++) {
    linear(up.mix, seen(positive, y, true, rows), line.data(), width);
    add(frame.at(y, 0), line.data(), size_t(width) * channels);
  }
  return frame;
}

// Frame -> image (3, H step, W step) in [-1, 1]
inline void draw_pixels(const Decoder& d, Frame& frame, float* image) {
  const int step = d.step, width = frame.width * step, outputs = d.out.outputs;
  const size_t plane = size_t(width) * frame.height * step;
  std::vector<float> rows, line(size_t(frame.width) * outputs);
  for (int y = 0; y < frame.height; y++) {
    linear(d.out, seen(frame, y, step == 1, rows), line.data(), frame.width);
    for (int x = 0; x < frame.width; x++)
      for (int o = 0; o < outputs; o++) {
        const int channel = o / (step * step), dy = o / step % step, dx = o % step;
        const float value = line[size_t(x) * outputs + o];
        image[channel * plane + size_t(y * step + dy) * width + x * step + dx] =
            value < -1 ? -1 : value > 1 ? 1 : value;  // NaN stays
      }
  }
}

// Latents (N, D) -> image (3, height, width)
inline void decode(const Decoder& d, const float* x, float* image) {
  const int N = d.rows * d.columns, C = d.pixels.body.width;
  Scratch scratch;
  std::vector<float> states(size_t(N) * d.features.body.width), features(size_t(N) * d.feature_head.outputs);
  std::vector<float> top(size_t(N) * C);
  run_tower(d.features, x, N, scratch, states.data());
  linear(d.feature_head, states.data(), features.data(), N);
  run_tower(d.pixels, features.data(), N, scratch, top.data());
  Frame frame(d.rows, d.columns, C);
  for (int y = 0; y < d.rows; y++)
    std::memcpy(frame.at(y, 0), &top[size_t(y) * d.columns * C], size_t(d.columns) * C * sizeof(float));
  for (const Upsample& up : d.upsamples) frame = upsampled(up, frame);
  if (!d.upsamples.empty()) frame = without_negatives(frame);
  draw_pixels(d, frame, image);
}
