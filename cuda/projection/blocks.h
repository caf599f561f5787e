// The CUDA projector as programs of thread blocks: forward prepare, mask, render; backward prepare, weigh, moments, finish.
//
// A program is a sequence of phases, block.each([&](int thread, State& own) { ... }), with a barrier after each; a test on the host
// runs the threads of a phase one after the other. No two threads write the same number, and every sum has its order, so two runs
// give the same bits.
#pragma once

#include "../block_math.h"
#include "direct.h"

namespace medgmae {

constexpr int kTileSide = 16, kTileThreads = 128;       // a block of the forward; a thread has the pixels of two rows
constexpr int kRegionSide = 64;                         // pixels along each side that share a list of Gaussians: whole tiles
constexpr int kMomentSide = 8, kMomentThreads = 64;     // a block of the backward has one Gaussian in one view
constexpr double kTwoToE = 1.4426950408889634074;       // exponents are powers of two

// Pixels that a Gaussian may reach in a view, inclusive.
struct PixelBox {
  int row[2], column[2];
  int kind;  // of Shadow
};
enum Shadow : int { kNothing, kEllipse, kOpen, kSpoiled };

// The workspace of a call.
struct ProjectWork {
  ProjectGaussian<double>* gaussians;  // (batch, count)
  PixelBox* boxes;                     // (batch, views, count)
  uint32_t* mask;                      // (batch, views, regions, words): bit i of word w is Gaussian 32 w + i
  void* images;                        // backward: (batch, views, rows, columns), the cotangent times |w|
  double* moments;                     // backward: (batch, views, count, kProjectMoments)
  int64_t regions, words;
  int64_t bytes;
};

MEDGMAE_HD int64_t tiles_along(int pixels, int side) { return (pixels + side - 1) / side; }
MEDGMAE_HD int64_t all_tiles(const ProjectCall& call, int side) { return tiles_along(call.rows, side) * tiles_along(call.columns, side); }

// How the workspace at `base` is divided; .bytes says how large it must be.
inline ProjectWork divide_project_workspace(const ProjectCall& call, int64_t element, void* base) {
  ProjectWork work = {};
  auto take = [&](int64_t bytes) {
    int64_t const at = work.bytes;
    work.bytes += (bytes + 255) / 256 * 256;
    return static_cast<char*>(base) + at;
  };
  int64_t const all = call.batch * call.views;
  work.regions = all_tiles(call, kRegionSide), work.words = (call.count + 31) / 32;
  work.gaussians = reinterpret_cast<ProjectGaussian<double>*>(take(call.batch * call.count * int64_t(sizeof(ProjectGaussian<double>))));
  work.boxes = reinterpret_cast<PixelBox*>(take(all * call.count * int64_t(sizeof(PixelBox))));
  if (call.grad == nullptr) {
    work.mask = reinterpret_cast<uint32_t*>(take(all * work.regions * work.words * int64_t(sizeof(uint32_t))));
  } else {
    work.images = take(all * call.rows * call.columns * element);
    work.moments = reinterpret_cast<double*>(take(all * call.count * kProjectMoments * int64_t(sizeof(double))));
  }
  return work;
}

// The ellipse n <= k^2 L, from its matrix, its centre and its value there.
template <class T>
MEDGMAE_DEVICE PixelBox pixel_box(const ProjectCall& call, const ProjectView& view, const ProjectGaussian<double>& g) {
  PixelBox box = {{0, call.rows - 1}, {0, call.columns - 1}, kSpoiled};
  if (!(g.spoiled == 0) || is_no_detector(view)) return box;
  ProjectFrame<double> const f = project_frame(view, g);
  if (!(f.depth > 0)) return {{0, -1}, {0, -1}, kNothing};
  double const support = visible_support<T>(call.support), square = support * support;
  double const q00 = f.k00 - square * f.l[2], q01 = f.k01 - 0.5 * square * f.l[3], q11 = f.k11 - square * f.l[4];
  double const r0 = -0.5 * square * f.l[0], r1 = -0.5 * square * f.l[1], determinant = q00 * q11 - q01 * q01;
  ProjectReach<double> const reach = project_reach(f, support);
  box.kind = kOpen;
  if (!(reach.a2 > 0 && reach.e2 < 0 && determinant > 0)) return box;
  box.kind = kEllipse;
  double const u = (q01 * r1 - q11 * r0) / determinant, v = (q01 * r0 - q00 * r1) / determinant, height = square - r0 * u - r1 * v;
  double const wide = sqrt(height * q11 / determinant), high = sqrt(height * q00 / determinant);
  box.column[0] = pixel_within(ceil(f.u + u - wide - 1e-6), 0, call.columns);
  box.column[1] = pixel_within(floor(f.u + u + wide + 1e-6) + 1, 0, call.columns) - 1;
  box.row[0] = pixel_within(ceil(f.v + v - high - 1e-6), 0, call.rows);
  box.row[1] = pixel_within(floor(f.v + v + high + 1e-6) + 1, 0, call.rows) - 1;
  return box;
}

// Loads numbers of Gaussian i of all sets, as whiten wants them.
template <class T>
struct GaussianLoader {
  const ProjectCall& call;
  int64_t i;
  MEDGMAE_MEMBER double operator()(int array, int k) const {
    const void* const arrays[4] = {call.means, call.scales, call.quats, call.densities};
    int const width = array == 3 ? 1 : array == 2 ? 4 : 3;
    return double(static_cast<const T*>(arrays[array])[i * width + k]);
  }
};

// One thread to a Gaussian.
template <class T>
MEDGMAE_DEVICE void whiten_one(const ProjectCall& call, const ProjectWork& work, int64_t i) {
  if (i < call.batch * call.count) work.gaussians[i] = whiten<T, double>(GaussianLoader<T>{call, i});
}

// One thread to a Gaussian in a view.
template <class T>
MEDGMAE_DEVICE void box_one(const ProjectCall& call, const ProjectWork& work, int64_t i) {
  if (i >= call.batch * call.views * call.count) return;
  int64_t const view = i / call.count, n = view / call.views * call.count + i % call.count;
  work.boxes[i] = pixel_box<T>(call, project_view(call, view), work.gaussians[n]);
}

MEDGMAE_DEVICE bool meets(const PixelBox& box, int row, int column, int side) {
  return box.row[0] < row + side && box.row[1] >= row && box.column[0] < column + side && box.column[1] >= column;
}

// One thread to a word of the mask.
MEDGMAE_DEVICE void mask_project_one(const ProjectCall& call, const ProjectWork& work, int64_t i) {
  int64_t const region = i % work.regions, word = i / work.regions % work.words, view = i / work.regions / work.words;
  if (view >= call.batch * call.views) return;
  int64_t const across = tiles_along(call.columns, kRegionSide), left = call.count - word * 32;
  const PixelBox* const boxes = work.boxes + view * call.count + word * 32;
  int const row = int(region / across) * kRegionSide, column = int(region % across) * kRegionSide;
  uint32_t bits = 0;
  for (int b = 0; b < 32 && b < left; ++b) bits |= meets(boxes[b], row, column, kRegionSide) ? uint32_t(1) << b : 0;
  work.mask[(view * work.regions + region) * work.words + word] = bits;
}

// A Gaussian as the pixels (i rows, j columns) away from a corner see it.
template <class T>
struct alignas(4 * sizeof(T)) ShadowCard {
  T dv, x, gamma, curve;                           // at the corner; exponent -curve x^2 - kappa dv^2 over L
  T kappa, amplitude, level, along, down;          // level: L at the corner, and its slopes
  T bend[3];                                       // of L: uu, uv, vv
  int kind, gaussian;
};

template <class T>
MEDGMAE_DEVICE ShadowCard<T> shadow_card(const ProjectView& view, const ProjectGaussian<double>& g, int kind, int row, int column) {
  ShadowCard<T> card = {};
  card.kind = kind, card.gaussian = 0;
  if (kind != kEllipse) return card;
  ProjectFrame<double> const f = project_frame(view, g);
  double const dv = row - f.v, du = column - f.u, unit = 0.5 * kTwoToE, most = 1e30;
  card.dv = T(dv), card.x = T(du - f.gamma * dv), card.gamma = T(f.gamma), card.amplitude = T(f.amplitude);
  card.curve = T(unit * (f.k00 < most ? f.k00 : most)), card.kappa = T(unit * (f.kappa < most ? f.kappa : most));
  card.level = T(1 + dv * (f.l[1] + f.l[4] * dv) + du * (f.l[0] + f.l[3] * dv + f.l[2] * du));
  card.along = T(f.l[0] + f.l[3] * dv + 2 * f.l[2] * du), card.down = T(f.l[1] + f.l[3] * du + 2 * f.l[4] * dv);
  card.bend[0] = T(f.l[2]), card.bend[1] = T(f.l[3]), card.bend[2] = T(f.l[4]);
  return card;
}

MEDGMAE_DEVICE float inverse_root_of(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1 / sqrtf(x);
#endif
}
MEDGMAE_DEVICE double inverse_root_of(double x) { return 1 / sqrt(x); }

template <class T>
struct ShadowPixel {
  T dv, x, exponent, inverse, weight;  // 1 / L; amplitude 1; 0 outside the support
};

template <class T>
MEDGMAE_DEVICE ShadowPixel<T> shadow_pixel(const ShadowCard<T>& card, T least, T i, T j) {
  ShadowPixel<T> p;
  p.dv = card.dv + i, p.x = card.x + (j - card.gamma * i);
  T const level = card.level + j * (card.along + card.bend[0] * j + card.bend[1] * i) + i * (card.down + card.bend[2] * i);
  T const root = inverse_root_of(level);
  p.inverse = root * root;
  p.exponent = -(card.curve * p.x * p.x + card.kappa * p.dv * p.dv) * p.inverse;
  p.weight = p.exponent >= least ? power_of_two(p.exponent) * root : T(0);
  return p;
}

template <class T>
MEDGMAE_DEVICE T least_project_exponent(const ProjectCall& call) {
  double const support = visible_support<T>(call.support);
  return T(-0.5 * kTwoToE * support * support);
}

template <class T>
struct TileShared {
  ProjectView view;
  ShadowCard<T> cards[kTileThreads];
  uint16_t list[32 * kTileThreads];  // Gaussians of the words at hand that reach the tile, in order
  int counts[kTileThreads], total;
};

template <class T>
struct TileThread {
  T sums[2];
  uint32_t hits;
};

MEDGMAE_DEVICE int first_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// A tile's place.
struct ProjectTile {
  int64_t view, region;
  int row, column;
};

MEDGMAE_DEVICE ProjectTile project_tile(const ProjectCall& call, const ProjectWork& work, int64_t index) {
  int64_t const tiles = all_tiles(call, kTileSide), across = tiles_along(call.columns, kTileSide), within = index % tiles;
  ProjectTile tile;
  tile.view = index / tiles, tile.row = int(within / across) * kTileSide, tile.column = int(within % across) * kTileSide;
  int64_t const region = tile.row / kRegionSide * tiles_along(call.columns, kRegionSide) + tile.column / kRegionSide;
  tile.region = tile.view * work.regions + region;
  return tile;
}

// Adds the cards to a thread's two pixels.
template <class T>
MEDGMAE_DEVICE void add_cards(const ProjectCall& call, const ProjectWork& work, const ProjectTile& tile, const TileShared<T>& shared,
                              int count, int t, T* sums) {
  T const least = least_project_exponent<T>(call), j = T(t % kTileSide);
  int const set = int(tile.view / call.views);
  for (int n = 0; n < count; ++n) {
    const ShadowCard<T>& card = shared.cards[n];
    for (int half = 0; half < 2; ++half) {
      int const i = t / kTileSide + half * (kTileSide / 2);
      if (card.kind == kEllipse) {
        sums[half] += card.amplitude * shadow_pixel(card, least, T(i), j).weight;
      } else if (card.kind == kSpoiled) {
        sums[half] = T(NAN);
      } else {
        const ProjectGaussian<double>& g = work.gaussians[int64_t(set) * call.count + card.gaussian];
        sums[half] += T(g.density * direct_pixel<double>(shared.view, g, call.support, tile.column + t % kTileSide, tile.row + i).weight);
      }
    }
  }
}

// Projects onto the tile of a block.
template <class T, class Block>
MEDGMAE_DEVICE void project_onto_tile(const ProjectCall& call, const ProjectWork& work, int64_t index, Block& block) {
  TileShared<T>& shared = *block.shared;
  ProjectTile const tile = project_tile(call, work, index);
  int64_t const first = tile.view / call.views * call.count;
  const PixelBox* const boxes = work.boxes + tile.view * call.count;
  block.each([&](int t, TileThread<T>& own) {
    if (t == 0) shared.view = project_view(call, tile.view);
    own.sums[0] = own.sums[1] = T(0);
  });
  int const all_words = int(work.words);
  for (int word = 0; word < all_words; word += kTileThreads) {
    int const words = all_words - word < kTileThreads ? all_words - word : kTileThreads;
    block.each([&](int t, TileThread<T>& own) {
      own.hits = 0;
      int count = 0;
      for (uint32_t left = t < words ? work.mask[tile.region * work.words + word + t] : 0; left != 0; left &= left - 1) {
        int const b = first_bit(left);
        if (meets(boxes[int64_t(word + t) * 32 + b], tile.row, tile.column, kTileSide)) own.hits |= uint32_t(1) << b, ++count;
      }
      shared.counts[t] = count;
    });
    block.each([&](int t, TileThread<T>& own) {
      int at = 0;
      for (int i = 0; i < t && i < words; ++i) at += shared.counts[i];
      for (uint32_t left = own.hits; left != 0; left &= left - 1) shared.list[at++] = uint16_t(32 * t + first_bit(left));
      if (t == kTileThreads - 1) shared.total = at;
    });
    for (int start = 0; start < shared.total; start += kTileThreads) {
      int const count = shared.total - start < kTileThreads ? shared.total - start : kTileThreads;
      block.each([&](int t, TileThread<T>&) {
        if (t >= count) return;
        int const n = 32 * word + shared.list[start + t];
        const ProjectGaussian<double>& g = work.gaussians[first + n];
        ShadowCard<T> card = shadow_card<T>(shared.view, g, boxes[n].kind, tile.row, tile.column);
        card.amplitude *= T(g.density), card.gaussian = n;
        shared.cards[t] = card;
      });
      block.each([&](int t, TileThread<T>& own) { add_cards(call, work, tile, shared, count, t, own.sums); });
    }
  }
  block.each([&](int t, TileThread<T>& own) {
    int const column = tile.column + t % kTileSide;
    for (int half = 0; half < 2; ++half) {
      int const row = tile.row + t / kTileSide + half * (kTileSide / 2);
      if (row >= call.rows || column >= call.columns) continue;
      T const length = shared.view.flat ? T(1) : T(sqrt(ray_square(shared.view, column, row)));
      static_cast<T*>(call.out)[(tile.view * call.rows + row) * call.columns + column] = own.sums[half] * length;
    }
  });
}

}  // namespace medgmae
