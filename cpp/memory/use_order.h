// When a page is used next, in the known order of a sweep: layers up, or up and then down; experts ascending within a
// layer either way. Times are in pages, counted from the start of the present layer, and only good for comparing.
#pragma once
#include <algorithm>
#include <cstdint>

namespace usaf {

// What the sweep is for.
enum class Phase : int32_t {
  inference = 0,         // layers up, then up again
  training_forward = 1,  // layers up, then down
  backward = 2,          // layers down, then up
};

// `expert` of `layer` has just been used.
struct Position {
  Phase phase;
  int64_t layer, expert;
};

struct UseOrder {
  int64_t num_layers, num_experts;

  // From `here` to the next use of (layer, expert).
  int64_t next_use(const Position& here, int64_t layer, int64_t expert) const {
    const bool passed = layer == here.layer && expert <= here.expert;
    int64_t layers = here.phase == Phase::backward ? here.layer - layer : layer - here.layer;
    if (layers < 0 || passed) layers = layers_until_turned(here, layer);
    return layers * num_experts + expert;
  }

  // From `here` to a sweep of `phase` at (layer, expert), which may lie beyond the next use. An order that is not the
  // known one counts as at once.
  int64_t use_in(const Position& here, Phase phase, int64_t layer, int64_t expert) const {
    int64_t layers = 0;
    if (phase == here.phase) {
      layers = phase == Phase::backward ? here.layer - layer : layer - here.layer;
      if (layers < 0 && phase == Phase::inference) layers += num_layers;
    } else if (phase != Phase::inference && here.phase != Phase::inference) {
      layers = layers_until_turned(here, layer);
    }
    return std::max<int64_t>(layers, 0) * num_experts + expert;
  }

  // Does the sweep at `here` still come to (layer, expert)?
  bool is_ahead(const Position& here, int64_t layer, int64_t expert) const {
    if (layer == here.layer) return expert > here.expert;
    return here.phase == Phase::backward ? layer < here.layer : layer > here.layer;
  }

  static Phase phase_after(Phase phase) {
    if (phase == Phase::inference) return phase;
    return phase == Phase::backward ? Phase::training_forward : Phase::backward;
  }

  // At most so many other pages are used between a page of `layer` being used in a sweep of `phase` and its use in the
  // next sweep.
  int64_t pages_until_reused(Phase phase, int64_t layer) const {
    if (phase == Phase::inference) return num_layers * num_experts - 1;
    const int64_t layers_beyond = phase == Phase::backward ? layer : num_layers - 1 - layer;
    return (layers_beyond + 1) * num_experts - 1;
  }

 private:
  // Layers to go to the end of this sweep and, in the next one, to `layer`.
  int64_t layers_until_turned(const Position& here, int64_t layer) const {
    switch (here.phase) {
      case Phase::training_forward:
        return (num_layers - 1 - here.layer) + 1 + (num_layers - 1 - layer);
      case Phase::backward:
        return here.layer + 1 + layer;
      case Phase::inference:
        break;
    }
    return num_layers - here.layer + layer;
  }
};

}  // namespace usaf
