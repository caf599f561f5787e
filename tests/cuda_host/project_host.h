// Runs all programs of the CUDA projector in the order of cuda/projection/project.cu; the includer brings run_blocks.
#pragma once

#include "../../cuda/projection/gradient_blocks.h"

namespace medgmae {
namespace {

template <class T>
void run_project(const ProjectCall& call, const ProjectWork& work) {
  int64_t const gaussians = call.batch * call.count, views = call.batch * call.views, shadows = views * call.count;
  for (int64_t i = 0; i < gaussians + 5; ++i) whiten_one<T>(call, work, i);
  for (int64_t i = 0; call.count > 0 && i < shadows + 5; ++i) box_one<T>(call, work, i);
  if (call.grad == nullptr) {
    int64_t const words = views * work.regions * work.words;
    for (int64_t i = 0; words > 0 && i < words + 5; ++i) mask_project_one(call, work, i);
    run_blocks<TileShared<T>, TileThread<T>>(views * all_tiles(call, kTileSide), kTileThreads, [&](int64_t index, auto& block) {
      project_onto_tile<T>(call, work, index, block);
    });
  } else {
    for (int64_t i = 0; i < views * call.rows * call.columns + 5; ++i) weigh_one<T>(call, work, i);
    run_blocks<ProjectMomentShared<T>, ProjectMomentThread<T>>(shadows, kMomentThreads, [&](int64_t index, auto& block) {
      sum_project_moments<T>(call, work, index, block);
    });
    for (int64_t i = 0; i < gaussians + 5; ++i) finish_project_one<T>(call, work, i);
  }
}

}  // namespace
}  // namespace medgmae
