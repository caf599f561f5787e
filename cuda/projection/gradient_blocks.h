// The backward of the CUDA projector: a block sums the moments of one Gaussian in one view, then a thread to a Gaussian goes through
// its views in order, and through the chain rule.
#pragma once

#include "blocks.h"

namespace medgmae {

// One thread to a pixel: the cotangent times |w|.
template <class T>
MEDGMAE_DEVICE void weigh_one(const ProjectCall& call, const ProjectWork& work, int64_t i) {
  int64_t const pixels = int64_t(call.rows) * call.columns;
  if (i >= call.batch * call.views * pixels) return;
  ProjectView const view = project_view(call, i / pixels);
  T const length = view.flat ? T(1) : T(sqrt(ray_square(view, double(i % call.columns), double(i % pixels / call.columns))));
  static_cast<T*>(work.images)[i] = static_cast<const T*>(call.grad)[i] * length;
}

template <class T>
struct ProjectMomentShared {
  ProjectView view;
  ShadowCard<T> card;
  double sums[kProjectMoments][kMomentThreads];
};

template <class T>
struct ProjectMomentThread {
  T sums[kProjectMoments];
  double direct[kDirectMoments];
};

// A thread's pixels of an ellipse: every eighth row and column of its box.
template <class T>
MEDGMAE_DEVICE void sum_shadow(const ProjectCall& call, const PixelBox& box, const ShadowCard<T>& card, const T* image, int t, T* s) {
  T const least = least_project_exponent<T>(call);
  for (int row = box.row[0] + t / kMomentSide; row <= box.row[1]; row += kMomentSide) {
    for (int column = box.column[0] + t % kMomentSide; column <= box.column[1]; column += kMomentSide) {
      ShadowPixel<T> const p = shadow_pixel(card, least, T(row - box.row[0]), T(column - box.column[0]));
      if (p.weight == T(0)) continue;
      T const weighted = image[int64_t(row) * call.columns + column] * p.weight, q = weighted * p.inverse;
      T const r = q * (p.exponent * T(-1 / kTwoToE) - T(0.5)), qx = q * p.x, qv = q * p.dv, rx = r * p.x, rv = r * p.dv;
      s[0] += weighted, s[1] += qx, s[2] += qv, s[3] += qx * p.x, s[4] += qx * p.dv, s[5] += qv * p.dv;
      s[6] += r, s[7] += rx, s[8] += rv, s[9] += rx * p.x, s[10] += rx * p.dv, s[11] += rv * p.dv;
    }
  }
}

template <class T>
MEDGMAE_DEVICE void sum_direct(const ProjectCall& call, const ProjectView& view, const ProjectGaussian<double>& g, const T* image, int t,
                               double* s) {
  for (int row = t / kMomentSide; row < call.rows; row += kMomentSide) {
    for (int column = t % kMomentSide; column < call.columns; column += kMomentSide) {
      DirectPixel<double> const p = direct_pixel<double>(view, g, call.support, double(column), double(row));
      if (p.weight != 0) add_direct(p, double(image[int64_t(row) * call.columns + column]) * p.weight, s);
    }
  }
}

// Moments of Gaussian index % count in view index / count.
template <class T, class Block>
MEDGMAE_DEVICE void sum_project_moments(const ProjectCall& call, const ProjectWork& work, int64_t index, Block& block) {
  ProjectMomentShared<T>& shared = *block.shared;
  int64_t const view = index / call.count;
  const ProjectGaussian<double>& g = work.gaussians[view / call.views * call.count + index % call.count];
  PixelBox const box = work.boxes[index];
  const T* const image = static_cast<const T*>(work.images) + view * call.rows * call.columns;
  block.each([&](int t, ProjectMomentThread<T>& own) {
    for (int k = 0; k < kProjectMoments; ++k) own.sums[k] = T(0);
    for (int k = 0; k < kDirectMoments; ++k) own.direct[k] = 0;
    if (t > 0) return;
    shared.view = project_view(call, view);
    shared.card = shadow_card<T>(shared.view, g, box.kind, box.row[0], box.column[0]);
  });
  block.each([&](int t, ProjectMomentThread<T>& own) {
    if (box.kind == kEllipse) sum_shadow(call, box, shared.card, image, t, own.sums);
    if (box.kind == kOpen) sum_direct(call, shared.view, g, image, t, own.direct);
    for (int k = 0; k < kProjectMoments; ++k) {
      shared.sums[k][t] = box.kind == kOpen ? (k < kDirectMoments ? own.direct[k] : 0.0) : double(own.sums[k]);
    }
  });
  for (int half = kMomentThreads / 2; half > 0; half /= 2) {
    block.each([&](int t, ProjectMomentThread<T>&) {
      for (int k = 0; k < kProjectMoments && t < half; ++k) shared.sums[k][t] += shared.sums[k][t + half];
    });
  }
  block.each([&](int t, ProjectMomentThread<T>&) {
    if (t < kProjectMoments) work.moments[index * kProjectMoments + t] = shared.sums[t][0];
  });
}

// One thread to a Gaussian: its gradients.
template <class T>
MEDGMAE_DEVICE void finish_project_one(const ProjectCall& call, const ProjectWork& work, int64_t i) {
  if (i >= call.batch * call.count) return;
  const ProjectGaussian<double>& g = work.gaussians[i];
  ProjectTotals<double> totals = {};
  bool spoiled = !(g.spoiled == 0);
  int64_t const set = i / call.count;
  for (int64_t v = set * call.views; v < (set + 1) * call.views; ++v) {
    int64_t const at = v * call.count + i % call.count;
    int const kind = work.boxes[at].kind;
    const double* const moments = work.moments + at * kProjectMoments;
    ProjectView const view = project_view(call, v);
    if (kind == kEllipse) project_chain(view, project_frame(view, g), moments, &totals);
    if (kind == kOpen) direct_chain(g, moments, &totals);
    spoiled = spoiled || kind == kSpoiled;
  }
  double gradients[11];
  project_gradients<double>(GaussianLoader<T>{call, i}, totals, gradients);
  write_project_gradients<T>(call, i, [&](int k) { return spoiled ? double(NAN) : gradients[k]; });
}

}  // namespace medgmae
