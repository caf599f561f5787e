// The CPU projector: the walk over views, rows of the detector and Gaussians, forward and backward. Work is shared out so that no
// two threads write the same number and every sum has its order: the result does not depend on the number of threads.
#pragma once

#include <new>

#include "../cpu_memory.h"
#include "direct.h"
#include "patches.h"
#include "strips.h"

namespace medgmae {
namespace {

constexpr int64_t kViewsMemory = int64_t(1) << 26;  // bytes of what is kept of several views at a time

inline int64_t image_pixels(const ProjectCall& call) { return int64_t(call.rows) * call.columns; }

// A row of a buffer, which may be read and written up to a vector beyond its end.
inline int64_t buffer_stride(const ProjectCall& call) { return (call.columns + 63) / 64 * 64 + 80; }

// Rows of a buffer for so many of a view: the last of those that are computed together may lie below them, in a forward also above.
constexpr int kSpareRows = 4;
inline int64_t buffer_rows(int64_t rows) { return rows + kSpareRows; }

// Calls visit(rows, first row) for blocks of the rows [first, last] of Gaussian i of a group.
template <class T, class Visit>
void for_row_blocks(const ProjectCall& call, const Group& g, int i, int first, int last, RowTable<T>* table, Visit visit) {
  for (int row = first; row <= last; row += kRowBlock) {
    int const rows = last - row + 1 < kRowBlock ? last - row + 1 : kRowBlock;
    fill_rows(g, i, row, rows, call.columns, table);
    visit(rows, row);
  }
}

// Gaussian i of group n of all sets.
template <class T>
ProjectGaussian<double> one_of(const ProjectCall& call, int64_t n, int i) {
  Whitened const group = whiten<T, Doubles>(GroupLoader<T>(call, n));
  ProjectGaussian<double> g;
  const Doubles* const from = reinterpret_cast<const Doubles*>(&group);
  for (size_t k = 0; k < sizeof(g) / sizeof(double); ++k) reinterpret_cast<double*>(&g)[k] = lane(from[k], i);
  return g;
}

// As render_band, of one Gaussian whose shadow is no ellipse.
template <class T>
void render_direct(const ProjectCall& call, const ProjectView& view, const ProjectGaussian<double>& g, int first, int last, T* image,
                   int64_t stride) {
  for (int row = first; row <= last; ++row, image += stride) {
    for (int u = 0; u < call.columns; u += kGroup) {
      Doubles const weight = direct_pixel<Doubles>(view, g, call.support, ramp(double(u)), row).weight;
      for (int k = 0; k < kGroup; ++k) image[u + k] += T(g.density * weight[k]);
    }
  }
}

// Adds the Gaussians of a set to the rows [first, last] of a view, which begin at `image`.
template <class T>
void render_band(const ProjectCall& call, const ProjectView& view, int64_t set, const Group* groups, int first, int last, T* image,
                 int64_t stride) {
  RowTable<T> table;
  Strips<T> strips;
  for (int64_t n = 0; n < groups_of(call); ++n) {
    const Group& g = groups[n];
    // Most Gaussians of a group may lie in other bands, at random: a branch for each would be foreseen wrongly.
    uint32_t met = 0;
    for (int i = 0; i < kGroup; ++i) met |= uint32_t(g.first[i] <= last && g.last[i] >= first && g.first[i] <= g.last[i]) << i;
    for (; met != 0; met &= met - 1) {
      int const i = __builtin_ctz(met);
      int const top = g.first[i] > first ? g.first[i] : first, bottom = g.last[i] < last ? g.last[i] : last;
      if (g.open[i]) {
        render_direct(call, view, one_of<T>(call, set * groups_of(call) + n, i), first, last, image, stride);
        continue;
      }
      if (g.vectors[i] > 0) {
        Patch<T> const p = patch_of<T>(g, i, visible_support<T>(call.support));
        if (view.flat) add_patch<T, Shape::flat>(p, top, bottom, image, first, stride);
        else add_patch<T, Shape::cone>(p, top, bottom, image, first, stride);
        continue;
      }
      if (view.flat && prepare_strips(g, i, visible_support<T>(call.support), call.columns, lane(g.amplitude, i), &strips)) {
        if (is_wide(strips)) add_strips<T, 2>(strips, call.rows, first, last, image, stride);
        else add_strips<T, 1>(strips, call.rows, first, last, image, stride);
        continue;
      }
      Profile<T> const p = profile_of<T>(g, i);
      for_row_blocks(call, g, i, top, bottom, &table, [&](int rows, int row) {
        T* const at = image + (row - first) * stride;
        if (view.flat) add_rows<T, Shape::flat>(p, table, rows, at, stride);
        else add_rows<T, Shape::cone>(p, table, rows, at, stride);
      });
    }
  }
}

// out = in |w| for a row of a view; in a flat one, out = in.
template <class T>
void times_rays(const ProjectCall& call, const ProjectView& view, int row, const T* in, T* out) {
  if (view.flat) {
    memcpy(out, in, size_t(call.columns) * sizeof(T));
    return;
  }
  double const start = ray_square(view, 0, row), bend = dot3(view.column, view.column);
  double const slope = ray_square(view, 1, row) - start - bend;
  for (int u = 0; u < call.columns; u += kGroup) {
    Doubles const at = ramp(double(u)), length = root_lanes(start + at * (slope + at * bend));
    T factor[kGroup];
    store_as(factor, length);
    if (u + kGroup <= call.columns) {
      for (int k = 0; k < kGroup; ++k) out[u + k] = in[u + k] * factor[k];
    } else {
      for (int k = 0; u + k < call.columns; ++k) out[u + k] = in[u + k] * factor[k];
    }
  }
}

// How views are taken together, and detectors divided.
struct ViewPlan {
  int64_t together;  // views of all sets whose groups, or images, are kept at a time
  int band, bands;   // rows, and how many
};

inline ViewPlan plan_views(const ProjectCall& call, int64_t bytes_per_view, int threads) {
  ViewPlan plan;
  int64_t const all = call.batch * call.views, fit = kViewsMemory / (bytes_per_view + 1) + 1;
  plan.together = fit < all ? fit : all;
  int64_t const wanted = threads == 1 ? 1 : (2 * int64_t(threads) + plan.together - 1) / (plan.together > 0 ? plan.together : 1);
  int const most = (call.rows + 7) / 8, bands = wanted < most ? int(wanted) : most;
  plan.band = (call.rows + bands - 1) / bands, plan.bands = (call.rows + plan.band - 1) / plan.band;
  return plan;
}

inline bool is_spoiled(const Whitened& group) {
  bool spoiled = false;
  for (int i = 0; i < kGroup; ++i) spoiled = spoiled || !(group.spoiled[i] == 0);
  return spoiled;
}

// Writes the groups n of all views from `first` on that are of one set; true if one of the Gaussians cannot be projected.
template <class T>
bool fill_groups(const ProjectCall& call, const ProjectView* views, int64_t n, int64_t count, Group* to) {
  Whitened const g = whiten<T, Doubles>(GroupLoader<T>(call, n));
  int const lanes = lanes_of(call, n % groups_of(call));
  // In its place: a copy of a group takes as long as to find it.
  for (int64_t v = 0; v < count; ++v, to += groups_of(call)) {
    new (to) Group(group_in_view<T>(call, project_frame(views[v], g), g.density, lanes));
  }
  return is_spoiled(g);
}

template <class T>
void project_band(const ProjectCall& call, const ProjectView& geometry, const Group* groups, bool spoiled, int64_t view, int first,
                  int last, T* buffer) {
  int64_t const stride = buffer_stride(call);
  buffer += kSpareRows * stride;
  memset(buffer, 0, size_t(stride * (last - first + 1)) * sizeof(T));
  if (!spoiled) render_band<T>(call, geometry, view / call.views, groups, first, last, buffer, stride);
  T* const out = static_cast<T*>(call.out) + view * image_pixels(call);
  for (int row = first; row <= last; ++row) {
    T* const to = out + int64_t(row) * call.columns;
    times_rays(call, geometry, row, buffer + (row - first) * stride, to);
    for (int u = 0; spoiled && u < call.columns; ++u) to[u] = T(NAN);
  }
}

// False if there is not enough memory.
template <class T>
bool project_forward(const ProjectCall& call, int threads) {
  int64_t const groups = groups_of(call), all = call.batch * call.views;
  ViewPlan const plan = plan_views(call, groups * int64_t(sizeof(Group)), threads);
  ThreadMemory<Group> kept(plan.together * groups + 1);
  ThreadMemory<ProjectView> views(all + 1);
  ThreadMemory<bool> spoiled(call.batch + 1);
  bool enough = kept.at != nullptr && views.at != nullptr && spoiled.at != nullptr;
  if (!enough) return false;
  for (int64_t i = 0; i < all; ++i) views.at[i] = project_view(call, i);
  memset(spoiled.at, 0, size_t(call.batch) * sizeof(bool));
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    ThreadMemory<T> buffer((buffer_rows(plan.band) + kSpareRows) * buffer_stride(call));
    if (buffer.at == nullptr) {
#pragma omp atomic write
      enough = false;
    }
    for (int64_t start = 0; start < all; start += plan.together) {
      int64_t const end = all - start < plan.together ? all : start + plan.together;
      int64_t const sets = start / call.views, behind = (end - 1) / call.views + 1;
#pragma omp for schedule(static)
      for (int64_t n = sets * groups; n < behind * groups; ++n) {
        int64_t const set = n / groups, first = set * call.views, last = first + call.views;
        int64_t const from = first > start ? first : start, to = last < end ? last : end;
        if (fill_groups<T>(call, views.at + from, n, to - from, kept.at + (from - start) * groups + n % groups)) {
#pragma omp atomic write
          spoiled.at[set] = true;
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < (end - start) * plan.bands; ++i) {
        int64_t const view = start + i / plan.bands;
        int const first = int(i % plan.bands) * plan.band, below = first + plan.band;
        if (buffer.at == nullptr) continue;
        project_band<T>(call, views.at[view], kept.at + i / plan.bands * groups, spoiled.at[view / call.views], view, first,
                        (below < call.rows ? below : call.rows) - 1, buffer.at);
      }
    }
  }
  return enough;
}

// Moments of Gaussian i of a group over an image.
template <class T>
void gaussian_moments(const ProjectCall& call, const ProjectView& view, const Group& g, int i, const T* image, Doubles* moments) {
  int64_t const stride = buffer_stride(call);
  if (g.vectors[i] > 0) {
    double found[kProjectMoments];
    Patch<T> const p = patch_of<T>(g, i, visible_support<T>(call.support));
    if (view.flat) sum_patch<T, Shape::flat>(p, g.first[i], g.last[i], image, stride, found);
    else sum_patch<T, Shape::cone>(p, g.first[i], g.last[i], image, stride, found);
    for (int k = 0; k < kProjectMoments; ++k) reinterpret_cast<double*>(moments + k)[i] = found[k];
    return;
  }
  Strips<T> strips;
  if (view.flat && prepare_strips(g, i, visible_support<T>(call.support), call.columns, 1, &strips)) {
    double found[6];
    if (is_wide(strips)) sum_strips<T, 2>(strips, call.rows, image, stride, found);
    else sum_strips<T, 1>(strips, call.rows, image, stride, found);
    for (int k = 0; k < 6; ++k) reinterpret_cast<double*>(moments + k)[i] = found[k];
    return;
  }
  RowTable<T> table;
  MomentSums<T> sums = {};
  Profile<T> const p = profile_of<T>(g, i);
  for_row_blocks(call, g, i, g.first[i], g.last[i], &table, [&](int rows, int row) {
    const T* const at = image + row * stride;
    if (view.flat) sum_rows<T, Shape::flat>(p, table, rows, at, stride, &sums);
    else sum_rows<T, Shape::cone>(p, table, rows, at, stride, &sums);
  });
  T totals[16];
  total_sums(sums, totals);
  for (int k = 0; k < kProjectMoments; ++k) reinterpret_cast<double*>(moments + k)[i] = double(totals[k]);
}

// Adds the gradients of one Gaussian whose shadow is no ellipse.
template <class T>
void direct_gradient(const ProjectCall& call, const ProjectView& view, const ProjectGaussian<double>& g, const T* image,
                     ProjectTotals<double>* totals) {
  Doubles moments[kDirectMoments] = {};
  for (int row = 0; row < call.rows; ++row, image += buffer_stride(call)) {
    for (int u = 0; u < call.columns; u += kGroup) {
      DirectPixel<Doubles> const pixel = direct_pixel<Doubles>(view, g, call.support, ramp(double(u)), row);
      Doubles grad;
      for (int k = 0; k < kGroup; ++k) grad[k] = pixel.weight[k] != 0 ? double(image[u + k]) : 0.0;  // what is outside may be NaN
      add_direct(pixel, grad * pixel.weight, moments);
    }
  }
  double sums[kDirectMoments];
  for (int k = 0; k < kDirectMoments; ++k) sums[k] = sum<double>(moments[k]);
  direct_chain(g, sums, totals);
}

// Adds the gradients of group n of all sets in some views to its totals.
template <class T>
void group_gradient(const ProjectCall& call, int64_t n, const Whitened& gaussian, const ProjectView* geometry, int64_t views,
                    const T* images, ProjectTotals<Doubles>* totals) {
  int const lanes = lanes_of(call, n % groups_of(call));
  int64_t const pixels = buffer_stride(call) * buffer_rows(call.rows);
  Doubles* const to = reinterpret_cast<Doubles*>(totals);
  for (int64_t v = 0; v < views; ++v) {
    const ProjectView& view = geometry[v];
    ProjectFrame<Doubles> const frame = project_frame(view, gaussian);
    Group const group = group_in_view<T>(call, frame, splat(1.0), lanes);
    Doubles moments[kProjectMoments] = {};
    Mask<double> reached = {};
    for (int i = 0; i < lanes; ++i) {
      if (group.first[i] > group.last[i]) continue;
      if (group.open[i]) {
        ProjectTotals<double> part = {};
        direct_gradient(call, view, one_of<T>(call, n, i), images + v * pixels, &part);
        for (int k = 0; k < kProjectTotals; ++k) to[k][i] += reinterpret_cast<double*>(&part)[k];
        continue;
      }
      reached[i] = -1;
      gaussian_moments<T>(call, view, group, i, images + v * pixels, moments);
    }
    ProjectTotals<Doubles> part = {};
    project_chain(view, frame, moments, &part);
    const Doubles* const from = reinterpret_cast<const Doubles*>(&part);
    for (int k = 0; k < kProjectTotals; ++k) to[k] += keep<double>(reached, from[k]);  // others may be no numbers
  }
}

// The gradients of a group's Gaussians from its totals.
template <class T>
void finish_group(const ProjectCall& call, int64_t i, const Whitened& gaussian, const ProjectTotals<Doubles>& totals) {
  int64_t const set = i / groups_of(call), group = i % groups_of(call), first = set * call.count + group * kGroup;
  Doubles gradients[11];
  project_gradients<Doubles>(GroupLoader<T>(call, i), totals, gradients);
  for (Doubles& gradient : gradients) gradient += gaussian.spoiled;  // 0, or NaN
  for (int n = 0; n < lanes_of(call, group); ++n) {
    write_project_gradients<T>(call, first + n, [&](int k) { return lane(gradients[k], n); });
  }
}

// What the backward keeps of a group from some views to the next.
struct GroupSums {
  Whitened gaussians;
  ProjectTotals<Doubles> totals;
};

// False if there is not enough memory.
template <class T>
bool project_gradient(const ProjectCall& call, int threads) {
  int64_t const groups = groups_of(call), stride = buffer_stride(call), rows = buffer_rows(call.rows), image = stride * rows;
  int64_t const all = call.batch * call.views, fit = plan_views(call, image * int64_t(sizeof(T)), threads).together;
  bool const whole = fit >= call.views;
  int64_t const together = whole ? call.views : fit;
  ThreadMemory<GroupSums> sums(whole ? 1 : groups);
  ThreadMemory<ProjectView> geometry(all + 1);
  ThreadMemory<T> images(together * image + stride);
  if (sums.at == nullptr || geometry.at == nullptr || images.at == nullptr) return false;
  for (int64_t i = 0; i < all; ++i) geometry.at[i] = project_view(call, i);
#pragma omp parallel num_threads(threads)
  for (int64_t set = 0; set < call.batch; ++set) {
    FlushSubnormals flush;
    for (int64_t start = 0; start == 0 || start < call.views; start += together > 0 ? together : 1) {
      int64_t const rest = call.views - start, views = rest < together ? rest : together;
      const ProjectView* const seen_by = geometry.at + set * call.views + start;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < views * rows; ++i) {
        int64_t const view = i / rows, row = i % rows, seen = row < call.rows ? call.columns : 0;
        const T* const grad = static_cast<const T*>(call.grad) + ((set * call.views + start + view) * call.rows + row) * call.columns;
        T* const to = images.at + i * stride;
        if (seen > 0) times_rays(call, seen_by[view], int(row), grad, to);
        memset(to + seen, 0, size_t(stride - seen) * sizeof(T));
      }
#pragma omp for schedule(dynamic, 4)
      for (int64_t n = set * groups; n < (set + 1) * groups; ++n) {
        GroupSums own, *const group = whole ? &own : sums.at + n % groups;
        if (start == 0) group->gaussians = whiten<T, Doubles>(GroupLoader<T>(call, n)), group->totals = ProjectTotals<Doubles>{};
        group_gradient<T>(call, n, group->gaussians, seen_by, views, images.at, &group->totals);
        if (start + views == call.views) finish_group<T>(call, n, group->gaussians, group->totals);
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace medgmae
