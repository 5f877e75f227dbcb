// Both streams of a Pretzel at new positions, its loop over latents and its shallow flow, in float32 on the CPU.
//
// The twin of `inference/lean.py` for the models that `backend.py` takes. The caller owns all memory and says where
// everything stands; nothing depends on what is computed together, on threads, or on how a prompt is cut into passes.
// A lane is a sequence of its own: a conversation, or the unconditional branch of an image.
// Letters: M new positions, P images, N latents, D latent dim, E language width, C flow width, K head dim.

#include "layers.h"
#include "pixels.h"

namespace {

// ---- what Python passes ----------------------------------------------------------------------------------------

// Static memory of all lanes. h: (lanes, E), g: (lanes, C), states at the last position. Of images being drawn: u
// (lanes, N + 1, D), last latent zero; z (lanes, N, D); raw (lanes, N, 2 D), predicted log scales and means; added
// (lanes, N, C), the flow's input at a latent beside its weights times latents; rotations (lanes, N, K / 2, 2); strength (lanes, N).
struct Lanes {
  Cache language, flow;
  int64_t *length, *drawn;
  float *h, *g, *u, *z, *raw;
  const float *added, *language_rotation, *flow_rotation, *strength;
};

// M new positions, those of one lane behind each other. x: (M, E) language input; base: (M, C) flow input, at words
// beside their context; is_latent: (M,), null without latents; rotations (M, K / 2, 2); lanes: (M,) of each position.
struct Rows {
  const float *x, *base;
  const uint8_t* is_latent;
  const float *language_rotation, *flow_rotation;
  const int64_t* lanes;
  int64_t count;
};

// ---- the model -------------------------------------------------------------------------------------------------

// One block of the flow: projections around a stack. Inputs: the latent before the target, perhaps with those above.
struct Block {
  Stack body;
  Linear in, head;
  bool is_reversed = false;
};

struct Model {
  int latents, dim, vocab;
  float clip;
  Memory memory;
  Stack language;
  Block deep;
  std::vector<Block> shallow;
  Linear context, adapter_in, adapter_out, visual, text, logits;
  std::vector<int> near;  // (N + 1, 5): a latent, those left, above left, above and above right of it; N for none
};

// inputs: of the projection, whose bias is part of what is added to it
Block block_of(Tensors& t, const int32_t* sizes, const Model& m, int inputs) {
  Block block;
  block.in = linear_of(t, sizes[0], inputs, false);
  block.head = linear_of(t, 2 * m.dim, sizes[0]);
  block.body = stack_of(t, sizes, false);
  return block;
}

void joints_of(Tensors& t, Model& m, int adapter_inputs, int adapter_width, int context_inputs) {
  const int E = m.language.width, C = m.deep.body.width;
  m.context = linear_of(t, C, context_inputs);
  m.adapter_in = linear_of(t, adapter_width, adapter_inputs);
  m.adapter_out = linear_of(t, E, adapter_width);
  m.visual = linear_of(t, C, E, false);
  m.text = linear_of(t, E, C, false);
  m.logits = linear_of(t, m.vocab, E, false);
}

// ---- both streams ----------------------------------------------------------------------------------------------

// Memory of a pass over both streams: inputs and states of M positions, and which of them are words and latents.
struct Pass {
  Scratch scratch;
  std::vector<float> x, e, h, g, inputs, outputs, hidden;
  std::vector<int> words, latents;
  std::vector<Place> language, flow;

  void resize(const Model& m, size_t M) {
    x.resize(M * m.language.width), h.resize(M * m.language.width);
    e.resize(M * m.deep.body.width), g.resize(M * m.deep.body.width);
    language.resize(M), flow.resize(M);
    words.clear(), latents.clear();
  }
};

// e += layer(inputs) at the positions that are named; inputs hold one row for each of them.
void add_linear(const Linear& layer, const std::vector<int>& which, Pass& pass) {
  const size_t width = layer.outputs;
  pass.outputs.resize(which.size() * width);
  linear(layer, pass.inputs.data(), pass.outputs.data(), int(which.size()));
  for (size_t k = 0; k < which.size(); k++) add(&pass.e[which[k] * width], &pass.outputs[k * width], width);
}

// The flow's input at words: their states, and their embeddings without a scale if the projection takes them.
void add_context(const Model& m, const std::vector<float>& embedded, Pass& pass) {
  const size_t E = m.language.width, wide = m.context.inputs;
  const Norm plain{true, 1.1920929e-7f, std::vector<float>(E, 1.0f), std::vector<float>(E, 0.0f)};
  pass.inputs.resize(pass.words.size() * wide);
  for (size_t k = 0; k < pass.words.size(); k++) {
    std::memcpy(&pass.inputs[k * wide], &pass.h[pass.words[k] * E], E * sizeof(float));
    if (wide > E) apply(plain, &embedded[pass.words[k] * E], &pass.inputs[k * wide + E], 1);
  }
  add_linear(m.context, pass.words, pass);
}

void add_visual_skip(const Model& m, Pass& pass) {
  const size_t E = m.language.width;
  pass.inputs.resize(pass.latents.size() * E);
  for (size_t k = 0; k < pass.latents.size(); k++)
    std::memcpy(&pass.inputs[k * E], &pass.h[pass.latents[k] * E], E * sizeof(float));
  add_linear(m.visual, pass.latents, pass);
}

// Both streams over the inputs x and e of M positions; h and g of a lane are those of its last position.
void streams(const Model& m, const Lanes& lanes, int M, Pass& pass) {
  const size_t E = m.language.width, C = m.deep.body.width;
  const std::vector<float> embedded = pass.words.empty() ? std::vector<float>() : pass.x;
  run(m.language, pass.x.data(), pass.language.data(), M, lanes.language, pass.scratch, pass.h.data());
  if (!pass.words.empty()) add_context(m, embedded, pass);
  if (!pass.latents.empty()) add_visual_skip(m, pass);
  run(m.deep.body, pass.e.data(), pass.flow.data(), M, lanes.flow, pass.scratch, pass.g.data());
  for (int i = 0; i < M; i++) {
    const int64_t lane = pass.language[i].lane;
    std::memcpy(lanes.h + lane * E, &pass.h[i * E], E * sizeof(float));
    std::memcpy(lanes.g + lane * C, &pass.g[i * C], C * sizeof(float));
    lanes.length[lane] = pass.language[i].at + 1;
  }
}

void read(const Model& m, const Lanes& lanes, const Rows& rows, Pass& pass) {
  const int M = int(rows.count);
  pass.resize(m, M);
  std::memcpy(pass.x.data(), rows.x, pass.x.size() * sizeof(float));
  std::memcpy(pass.e.data(), rows.base, pass.e.size() * sizeof(float));
  const int64_t language = m.language.head_dim, flow = m.deep.body.head_dim;
  for (int i = 0; i < M; i++) {
    const int64_t lane = rows.lanes[i];
    const bool goes_on = i && rows.lanes[i - 1] == lane;
    const int64_t at = goes_on ? pass.language[i - 1].at + 1 : lanes.length[lane];
    (rows.is_latent && rows.is_latent[i] ? pass.latents : pass.words).push_back(i);
    pass.language[i] = {lane, at, rows.language_rotation + i * language};
    pass.flow[i] = {lane, at, rows.flow_rotation + i * flow};
  }
  streams(m, lanes, M, pass);
}

// ---- latents as input ------------------------------------------------------------------------------------------

const float* image_of(const Model& m, const float* buffers, int64_t lane) {
  return buffers + lane * (m.latents + 1) * m.dim;
}

// Copy `count` latents of an image that have these numbers.
void copy_latents(const Model& m, const float* image, const int* numbers, int count, float* to) {
  for (int k = 0; k < count; k++) std::memcpy(to + k * m.dim, image + numbers[k] * m.dim, m.dim * sizeof(float));
}

// The input of a block before `target`: the latent before it, and those above it if the projection takes them.
void copy_before(const Model& m, const Block& block, const float* image, int target, float* to) {
  const int before = target - 1;
  copy_latents(m, image, &before, 1, to);
  copy_latents(m, image, &m.near[target * 5 + 2], block.in.inputs / m.dim - 1, to + m.dim);
}

// The last latents of images as the language model reads them, into the first rows of x. adapter: its norm.
void adapt(const Model& m, const Lanes& lanes, const std::vector<int64_t>& images, const Norm& adapter, Pass& pass) {
  const int count = int(images.size()), wide = m.adapter_in.inputs;
  pass.inputs.resize(size_t(count) * wide);
  pass.hidden.resize(size_t(count) * m.adapter_in.outputs);
  for (int k = 0; k < count; k++) {
    const int* near = &m.near[(lanes.drawn[images[k]] - 1) * 5];
    copy_latents(m, image_of(m, lanes.u, images[k]), near, wide / m.dim, &pass.inputs[size_t(k) * wide]);
  }
  linear(m.adapter_in, pass.inputs.data(), pass.hidden.data(), count);
  for (size_t i = 0; i < pass.hidden.size(); i += FLOATS) store(&pass.hidden[i], silu(load(&pass.hidden[i])));
  linear(m.adapter_out, pass.hidden.data(), pass.x.data(), count);
  apply(adapter, pass.x.data(), pass.x.data(), count);
}

// The last latents of images, projected for the flow, into the first rows of e.
void project(const Model& m, const Lanes& lanes, const std::vector<int64_t>& images, Pass& pass) {
  const int count = int(images.size()), wide = m.deep.in.inputs;
  pass.inputs.resize(size_t(count) * wide);
  for (int k = 0; k < count; k++) {
    const int64_t lane = images[k];
    copy_before(m, m.deep, image_of(m, lanes.u, lane), int(lanes.drawn[lane]), &pass.inputs[size_t(k) * wide]);
  }
  linear(m.deep.in, pass.inputs.data(), pass.e.data(), count);
}

// ---- the loop over latents -------------------------------------------------------------------------------------

// The images that a call draws: their lanes, and those of their unconditional branches, the same without guidance.
// is_extrapolated: of each image, TARFlow's rule of guidance in place of STARFlow's; null: of none.
struct Drawing {
  const int64_t *main, *blank;
  const uint8_t* is_extrapolated;
  int32_t images;
};

// Gaussians from states g (rows, C): raw (rows, 2 D), log scales first, softly clipped, then means.
void gaussians(const Model& m, const Block& block, const float* g, float* raw, int rows) {
  linear(block.head, g, raw, rows);
  if (!m.clip) return;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < m.dim; i++) {
      float& log_scale = raw[size_t(r) * 2 * m.dim + i];
      log_scale = m.clip * std::tanh(log_scale / m.clip);
    }
}

// Guidance of one channel by the unconditional branch, as in `Affine.guide`.
void guide(float& log_scale, float& mu, float other_log_scale, float other_mu, float strength, bool is_extrapolated) {
  if (is_extrapolated) {
    mu += strength * (mu - other_mu);
    log_scale += strength * (log_scale - other_log_scale);
    return;
  }
  const float ratio = std::min(1.0f, std::exp(2 * (log_scale - other_log_scale)));
  const float precision = 1 + strength - strength * ratio;
  mu = ((1 + strength) * mu - strength * ratio * other_mu) / precision;
  log_scale -= 0.5f * std::log(precision);
}

// Where the prediction of a lane's next latent is kept.
float* raw_of(const Model& m, const Lanes& lanes, int64_t lane) {
  return lanes.raw + (lane * m.latents + lanes.drawn[lane]) * 2 * m.dim;
}

// Predict the next latent of these lanes from their states.
void predict_next(const Model& m, const Lanes& lanes, const std::vector<int64_t>& which, Pass& pass) {
  const size_t C = m.deep.body.width, wide = 2 * m.dim;
  pass.inputs.resize(which.size() * C);
  pass.outputs.resize(which.size() * wide);
  for (size_t k = 0; k < which.size(); k++)
    std::memcpy(&pass.inputs[k * C], lanes.g + which[k] * C, C * sizeof(float));
  gaussians(m, m.deep, pass.inputs.data(), pass.outputs.data(), int(which.size()));
  for (size_t k = 0; k < which.size(); k++)
    std::memcpy(raw_of(m, lanes, which[k]), &pass.outputs[k * wide], wide * sizeof(float));
}

// Sample the next latent of image k of a drawing from its z.
void sample(const Model& m, const Lanes& lanes, const Drawing& d, int k) {
  const int64_t lane = d.main[k], at = lane * m.latents + lanes.drawn[lane];
  const float *raw = raw_of(m, lanes, lane), *without = raw_of(m, lanes, d.blank[k]);
  float* u = lanes.u + (lane * (m.latents + 1) + lanes.drawn[lane]) * m.dim;
  const bool is_extrapolated = d.is_extrapolated && d.is_extrapolated[k];
  for (int i = 0; i < m.dim; i++) {
    float log_scale = raw[i], mu = raw[m.dim + i];
    if (raw != without) guide(log_scale, mu, without[i], without[m.dim + i], lanes.strength[at], is_extrapolated);
    u[i] = mu + std::exp(log_scale) * lanes.z[at * m.dim + i];
  }
}

// Let both branches of the images that are not finished read the latents just sampled.
void read_sampled(const Model& m, const Lanes& lanes, const Drawing& d, const Norm& adapter, Pass& pass) {
  std::vector<int64_t> images, which;  // lanes of images, and of images with their branches
  std::vector<int> source;             // of each of the latter, its image
  for (int branch = 0; branch < 2; branch++)
    for (int k = 0, image = 0; k < d.images; k++) {
      if (lanes.drawn[d.main[k]] == m.latents) continue;  // the last latent is read only if the conversation goes on
      if (!branch) images.push_back(d.main[k]);
      if (!branch || d.blank[k] != d.main[k]) which.push_back(branch ? d.blank[k] : d.main[k]), source.push_back(image);
      image++;
    }
  if (images.empty()) return;
  const size_t E = m.language.width, C = m.deep.body.width;
  pass.resize(m, which.size());
  adapt(m, lanes, images, adapter, pass);
  project(m, lanes, images, pass);
  for (size_t k = 0; k < which.size(); k++) {
    const int64_t at = which[k] * m.latents + lanes.drawn[which[k]] - 1, length = lanes.length[which[k]];
    if (k >= images.size()) std::copy_n(&pass.x[source[k] * E], E, &pass.x[k * E]);
    if (k >= images.size()) std::copy_n(&pass.e[source[k] * C], C, &pass.e[k * C]);
    pass.latents.push_back(int(k));
    pass.language[k] = {which[k], length, lanes.language_rotation + at * m.language.head_dim};
    pass.flow[k] = {which[k], length, lanes.flow_rotation + at * m.deep.body.head_dim};
  }
  for (size_t k = 0; k < which.size(); k++)
    add(&pass.e[k * C], lanes.added + (which[k] * m.latents + lanes.drawn[which[k]] - 1) * C, C);
  streams(m, lanes, int(which.size()), pass);
}

void draw(const Model& m, const Lanes& lanes, const Drawing& d, int count, const Norm& adapter) {
  Pass pass;
  std::vector<int64_t> both(d.main, d.main + d.images);
  for (int k = 0; k < d.images; k++)
    if (d.blank[k] != d.main[k]) both.push_back(d.blank[k]);
  for (int done = 0; done < count; done++) {
    predict_next(m, lanes, both, pass);
    for (int k = 0; k < d.images; k++) sample(m, lanes, d, k);
    for (int64_t lane : both) lanes.drawn[lane]++;
    read_sampled(m, lanes, d, adapter, pass);
  }
}

// ---- the shallow flow ------------------------------------------------------------------------------------------

// Memory of one block over B images: their latents in scan order with a zero one at the end (B, N + 1, D), the part of
// each slot beside its projection (N, C), rotations (N, K / 2, 2), keys and values.
struct Images {
  int B;
  const float *added, *rotation;
  std::vector<float> buffer, cached, inputs, e, g, raw;
  std::vector<Place> places;
  Scratch scratch;
};

Images images_of(const Model& m, const Block& block, int B) {
  Images images{};
  const size_t C = block.body.width;
  images.B = B;
  images.buffer.resize(size_t(B) * (m.latents + 1) * m.dim);
  images.cached.resize(block.body.layers.size() * 2 * B * m.latents * C);
  images.inputs.resize(size_t(B) * block.in.inputs), images.raw.resize(size_t(B) * 2 * m.dim);
  images.e.resize(B * C), images.g.resize(B * C);
  images.places.resize(B);
  return images;
}

Cache cache_of(const Model& m, const Block& block, Images& images) {
  const int64_t head = int64_t(m.latents) * block.body.head_dim, lane = head * block.body.kv_heads;
  return {images.cached.data(), 2 * images.B * lane, images.B * lane, lane, head};
}

// Gaussians of one target of every image from the latents before it: raw (B, 2 D).
void predict_target(const Model& m, const Block& block, int target, Images& images) {
  const int B = images.B, C = block.body.width, wide = block.in.inputs;
  for (int b = 0; b < B; b++) {
    images.places[b] = {b, target, images.rotation + target * block.body.head_dim};
    if (target) copy_before(m, block, image_of(m, images.buffer.data(), b), target, &images.inputs[size_t(b) * wide]);
  }
  if (target) linear(block.in, images.inputs.data(), images.e.data(), B);
  for (int b = 0; b < B; b++) add(&images.e[size_t(b) * C], images.added + size_t(target) * C, C);
  run(block.body, images.e.data(), images.places.data(), B, cache_of(m, block, images), images.scratch, images.g.data());
  gaussians(m, block, images.g.data(), images.raw.data(), B);
}

// One latent of every image by u = mu + scale z, in place.
void denormalize(const Model& m, int target, Images& images) {
  for (int b = 0; b < images.B; b++)
    for (int i = 0; i < m.dim; i++) {
      const float* raw = &images.raw[size_t(b) * 2 * m.dim];
      float& value = images.buffer[(size_t(b) * (m.latents + 1) + target) * m.dim + i];
      value = raw[m.dim + i] + std::exp(raw[i]) * value;
    }
}

// Copy images (B, N, D) into the buffer in the block's scan order, or back.
void scan(const Model& m, const Block& block, float* x, Images& images, bool is_back) {
  for (int b = 0; b < images.B; b++)
    for (int n = 0; n < m.latents; n++) {
      float* outside = x + (size_t(b) * m.latents + (block.is_reversed ? m.latents - 1 - n : n)) * m.dim;
      float* inside = &images.buffer[(size_t(b) * (m.latents + 1) + n) * m.dim];
      std::memcpy(is_back ? outside : inside, is_back ? inside : outside, m.dim * sizeof(float));
    }
}

}  // namespace

// ---- interface -------------------------------------------------------------------------------------------------

extern "C" {

// sizes: latents, dim, vocabulary, inputs of the deep and shallow projections, of the adapter, its width, inputs of the
// context; then six of each stack (`stack_of`): language, deep, shallow ones. reversed: of each of the shallow blocks.
// near: (N + 1, 5); tensors: as `backend.py` lists them.
void* starflow_create(const int32_t* sizes, int shallow, const int32_t* reversed, const int32_t* near, float clip,
                      const float* const* tensors) {
  Model* m = new Model{};
  Tensors t{tensors, m->memory};
  m->latents = sizes[0], m->dim = sizes[1], m->vocab = sizes[2], m->clip = clip;
  m->near.assign(near, near + (m->latents + 1) * 5);
  m->language = stack_of(t, sizes + 8, true);
  m->deep = block_of(t, sizes + 14, *m, sizes[3]);
  for (int i = 0; i < shallow; i++) {
    m->shallow.push_back(block_of(t, sizes + 20 + 6 * i, *m, sizes[4]));
    m->shallow.back().is_reversed = reversed[i];
  }
  joints_of(t, *m, sizes[5], sizes[6], sizes[7]);
  return m;
}

void starflow_free(void* model) { delete static_cast<Model*>(model); }

void starflow_read(const void* model, const Lanes* lanes, const Rows* rows) {
  Pass pass;
  read(*static_cast<const Model*>(model), *lanes, *rows, pass);
}

// adapter: weight and bias (E,) of its norm at the noise level of the images
void starflow_draw(const void* model, const Lanes* lanes, const Drawing* drawing, int count, const float* weight,
                   const float* bias) {
  const Model& m = *static_cast<const Model*>(model);
  const int E = m.language.width;
  const Norm adapter{false, 1e-5f, std::vector<float>(weight, weight + E), std::vector<float>(bias, bias + E)};
  draw(m, *lanes, *drawing, count, adapter);
}

// u -> x through the shallow blocks, both (B, N, D), in place, one latent after the other. added, rotations: of each
// block, (N, C) and (N, K / 2, 2).
void starflow_unshallow(const void* model, const float* const* added, const float* const* rotations, float* x, int B) {
  const Model& m = *static_cast<const Model*>(model);
  for (size_t i = m.shallow.size(); i-- > 0;) {
    const Block& block = m.shallow[i];
    Images images = images_of(m, block, B);
    images.added = added[i], images.rotation = rotations[i];
    scan(m, block, x, images, false);
    for (int n = 0; n < m.latents; n++) predict_target(m, block, n, images), denormalize(m, n, images);
    scan(m, block, x, images, true);
  }
}

// Next-token logits of lanes: (count, V)
void starflow_logits(const void* model, const Lanes* lanes, const int64_t* which, int count, float* logits) {
  const Model& m = *static_cast<const Model*>(model);
  const size_t E = m.language.width, C = m.deep.body.width;
  std::vector<float> h(count * E), g(count * C);
  for (int k = 0; k < count; k++) std::copy_n(lanes->g + which[k] * C, C, &g[k * C]);
  linear(m.text, g.data(), h.data(), count);
  for (int k = 0; k < count; k++) add(&h[k * E], lanes->h + which[k] * E, E);
  linear(m.logits, h.data(), logits, count);
}

// sizes: rows and columns of latents, their dim, side of the square that a position of the last layer draws, width of the
// features; then six of each stack (`stack_of`): of features, of pixels. channels: after each upsampling; tensors: as
// `pixels.py` lists them.
void* starflow_decoder_create(const int32_t* sizes, int upsamples, const int32_t* channels,
                              const float* const* tensors) {
  Decoder* decoder = new Decoder{};
  Tensors t{tensors, decoder->memory};
  decoder_of(t, sizes, upsamples, channels, *decoder);
  return decoder;
}

void starflow_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Latents (count, N, D) -> images (count, 3, height, width) in [-1, 1]
void starflow_decode(const void* decoder, const float* x, float* images, int count) {
  const Decoder& d = *static_cast<const Decoder*>(decoder);
  const size_t side = size_t(d.step) << d.upsamples.size(), image = 3 * d.rows * d.columns * side * side;
  for (int i = 0; i < count; i++) decode(d, x + size_t(i) * d.rows * d.columns * d.dim, images + i * image);
}

}  // extern "C"
