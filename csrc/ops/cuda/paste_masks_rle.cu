// COCO run lengths of pasted masks in five launches. `find_windows` finds the pixels of the image that each
// mask can reach. `rasterise_columns` pastes the masks into bits: a word is 32 pixels of a column, and the
// words of an instance are in the order of COCO's runs. `encode_runs`, with one block for each instance,
// finds the pixels that differ from the one before them; its first launch counts the characters.
// `add_lengths` sums them, the host allocates the text, and the second launch of `encode_runs` writes it.
//
// The bits of many instances on a large image take much memory. So instances are processed in batches, of
// which one suffices nearly always. With more of them, the bits are found once for counting and once for
// writing.
#include <algorithm>
#include <tuple>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/mask_sample.cuh"
#include "ops/paste_masks_rle.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// The rectangle of pixels that a mask can set. It has no columns if there are no such pixels.
struct Window {
  int first_row, rows, first_column, columns;

  // Whether a column of the window is a column of the image, so that the runs go on in the next column.
  __device__ bool whole_columns(int height) const { return rows == height; }

  // Otherwise a column of words includes at least one pixel below the window, which is off and ends all runs.
  __device__ int column_words(int height) const {
    return whole_columns(height) ? (rows + kWarp - 1) / kWarp : rows / kWarp + 1;
  }
};

struct RleArguments {
  const float *masks, *boxes;
  int count, mask_height, mask_width, height, width;
  float threshold;
  Window* windows;
  // For each instance of a batch: its columns of words, one after the other.
  unsigned int* bits;
  int64_t image_words;  // words of `bits` for each instance
  int64_t* offsets;     // [count + 1]; until they are summed, the length of text n is at n + 1
  uint8_t* text;

  __device__ MaskSampler sampler(int64_t n) const { return {masks, boxes, n, mask_height, mask_width}; }
};

constexpr int kPlanThreads = 64;

__global__ void __launch_bounds__(kPlanThreads) find_windows(RleArguments args) {
  const int64_t n = int64_t{blockIdx.x} * kPlanThreads + threadIdx.x;
  if (n >= args.count) return;
  const MaskSampler sampler = args.sampler(n);
  const bool zero_is_on = args.threshold <= 0.0f;
  const Range rows = zero_is_on ? Range{0, args.height} : sampler.y.window(args.height);
  const Range columns = zero_is_on ? Range{0, args.width} : sampler.x.window(args.width);
  args.windows[n] = {static_cast<int>(rows.begin), static_cast<int>(rows.size()),
                     static_cast<int>(columns.begin),
                     rows.size() == 0 ? 0 : static_cast<int>(columns.size())};
}

constexpr int kRasteriseWarps = 8;
constexpr int kRasteriseThreads = kRasteriseWarps * kWarp;
constexpr int kLaneColumns = 2;
constexpr int kStripColumns = kLaneColumns * kWarp;

// Blocks with the same x share an instance. A block takes strips of columns, and a warp rows of words in
// them.
__global__ void __launch_bounds__(kRasteriseThreads) rasterise_columns(RleArguments args, int64_t first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Window window = args.windows[first + blockIdx.x];
  const MaskSampler sampler = args.sampler(first + blockIdx.x);
  unsigned int* bits = args.bits + blockIdx.x * args.image_words;
  const int column_words = window.column_words(args.height);
  const int last_row = window.first_row + window.rows - 1;
  const bool whole_columns = window.whole_columns(args.height);
  const int step = static_cast<int>(gridDim.y) * kStripColumns;
  for (int left = static_cast<int>(blockIdx.y) * kStripColumns; left < window.columns; left += step) {
    ColumnStrip<kLaneColumns, kWarp> strip(sampler, window.first_column + left + lane);
    for (int word = warp; word < column_words; word += kRasteriseWarps) {
      const int row = window.first_row + word * kWarp + lane;
      // Below the image, the bits of a column repeat its last pixel. They then neither begin nor end a run,
      // and the last bit of the column is the pixel before the next column.
      PasteTaps<float> own = sampler.y.taps(min(row, last_row));
      if (row > last_row && !whole_columns) own.low = kOutside;
      unsigned int found[kLaneColumns] = {};
      for (int i = 0; i < kWarp; ++i) {
        float values[kLaneColumns];
        strip.values_at(taps_of_lane(own, i), values);
        PANFPN_UNROLL
        for (int j = 0; j < kLaneColumns; ++j) found[j] |= (values[j] >= args.threshold ? 1u : 0u) << i;
      }
      PANFPN_UNROLL
      for (int j = 0; j < kLaneColumns; ++j) {
        const int column = left + j * kWarp + lane;
        if (column < window.columns) bits[int64_t{column} * column_words + word] = found[j];
      }
    }
  }
}

constexpr int kEncodeWarps = 16;
constexpr int kEncodeThreads = kEncodeWarps * kWarp;
constexpr int kThreadWords = 8;  // words that a thread searches in each round
constexpr int kRoundWords = kEncodeThreads * kThreadWords;
constexpr int kMostEnds = 2048;  // ends of runs in shared memory

using Sum = unsigned long long;

struct BlockSums {
  Sum before, all;  // over the threads before this one, and over all
};

// All threads of the block call this together. `warp_sums` is shared, [kEncodeWarps].
__device__ BlockSums sum_block(Sum value, Sum* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Sum until = value;
  PANFPN_UNROLL
  for (int reach = 1; reach < kWarp; reach *= 2) {
    const Sum other = __shfl_up_sync(kAllLanes, until, reach);
    if (lane >= reach) until += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = until;
  __syncthreads();
  BlockSums sums{until - value, 0};
  PANFPN_UNROLL
  for (int i = 0; i < kEncodeWarps; ++i) {
    if (i < warp) sums.before += warp_sums[i];
    sums.all += warp_sums[i];
  }
  __syncthreads();  // before the next call writes
  return sums;
}

// The pixels of a window as bits, in the order of COCO's runs. After the last word, all pixels are off.
class BitStream {
 public:
  __device__ BitStream(const RleArguments& args, const Window& window, const unsigned int* bits)
      : bits_(bits),
        height_(args.height),
        column_words_(window.column_words(args.height)),
        words_(int64_t{window.columns} * column_words_),
        first_pixel_(int64_t{window.first_column} * args.height + window.first_row) {}

  __device__ int64_t words() const { return words_; }

  // The number of changes in a thread's words, from `begin` on: bits that differ from the bit before them.
  __device__ int count_changes(int64_t begin) const {
    unsigned int last = begin > 0 ? at(begin - 1) : 0;
    int count = 0;
    PANFPN_UNROLL
    for (int i = 0; i < kThreadWords; ++i) count += __popc(changes(begin + i, last));
    return count;
  }

  // Calls found(pixel) for each of these changes. A pixel is counted in column order over the whole image.
  template <typename F>
  __device__ void for_each_change(int64_t begin, F&& found) const {
    int64_t column = begin / column_words_, row = begin - column * column_words_;
    unsigned int last = begin > 0 ? at(begin - 1) : 0;
    for (int i = 0; i < kThreadWords; ++i) {
      const int64_t pixel = first_pixel_ + column * height_ + row * kWarp;
      for (unsigned int left = changes(begin + i, last); left != 0; left &= left - 1) {
        found(pixel + __ffs(static_cast<int>(left)) - 1);
      }
      if (++row == column_words_) row = 0, ++column;
    }
  }

 private:
  __device__ unsigned int at(int64_t i) const { return i < words_ ? bits_[i] : 0; }

  // `last` is the word before word `i`, and then word `i`.
  __device__ unsigned int changes(int64_t i, unsigned int& last) const {
    const unsigned int word = at(i), shifted = word << 1 | last >> (kWarp - 1);
    last = word;
    return word ^ shifted;
  }

  const unsigned int* bits_;
  int64_t height_, column_words_, words_, first_pixel_;
};

// Turns the ends of the runs of one instance into text, or counts its characters. All threads of the block
// call the methods together.
template <bool kWrite>
class RunEncoder {
 public:
  // The arrays are shared: [kEarlierEnds + kMostEnds] and [kEncodeWarps]. `text` is the beginning of the
  // text.
  __device__ RunEncoder(int64_t* ends, Sum* warp_sums, uint8_t* text)
      : ends_(ends), warp_sums_(warp_sums), text_(text) {
    if (thread() < kEarlierEnds) ends_[thread()] = 0;
  }

  // The place of end `i` of the next `append`.
  __device__ int64_t& end(int64_t i) { return ends_[kEarlierEnds + i]; }

  // Encodes the runs with the `count` ends that threads have written.
  __device__ void append(int count) {
    __syncthreads();
    for (int first = 0; first < count; first += kEncodeThreads) {
      const int i = first + thread();
      const bool used = i < count;
      const int64_t number = used ? run_number(runs_ + i, &end(i)) : 0;
      Sum length = 0;
      for (NumberText text(number); used && text.more(); text.next()) ++length;
      if constexpr (kWrite) {
        const BlockSums sums = sum_block(length, warp_sums_);
        uint8_t* out = text_ + sums.before;
        for (NumberText text(number); used && text.more();) *out++ = text.next();
        text_ += sums.all;
      } else {
        length_ += length;
      }
    }
    runs_ += count;
    __syncthreads();
    const int64_t kept = thread() < kEarlierEnds ? ends_[count + thread()] : 0;
    __syncthreads();
    if (thread() < kEarlierEnds) ends_[thread()] = kept;
  }

  // Ends the last run at the end of the image, unless the last change is already there.
  __device__ void finish(int64_t pixels) {
    __syncthreads();
    if (runs_ > 0 && ends_[kEarlierEnds - 1] == pixels) return;
    if (thread() == 0) end(0) = pixels;
    append(1);
  }

  // The number of characters, if they are counted.
  __device__ Sum length() { return sum_block(length_, warp_sums_).all; }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  int64_t* ends_;
  Sum* warp_sums_;
  uint8_t* text_;
  int64_t runs_ = 0;
  Sum length_ = 0;  // characters of this thread's runs
};

// A block for each instance. In a round, each thread counts the changes in its words; the ranks of all
// changes follow. The changes are the ends of the runs. Only noise has more of them in a round than fit in
// shared memory.
template <bool kWrite>
__global__ void __launch_bounds__(kEncodeThreads) encode_runs(RleArguments args, int64_t first) {
  PANFPN_SHARED(int64_t, ends, kEarlierEnds + kMostEnds);
  PANFPN_SHARED(Sum, warp_sums, kEncodeWarps);
  const int64_t n = first + blockIdx.x;
  const BitStream stream(args, args.windows[n], args.bits + blockIdx.x * args.image_words);
  RunEncoder<kWrite> encoder(ends, warp_sums, kWrite ? args.text + args.offsets[n] : nullptr);
  for (int64_t round = 0; round <= stream.words(); round += kRoundWords) {
    const int64_t own = round + static_cast<int>(threadIdx.x) * kThreadWords;
    const int changes = stream.count_changes(own);
    const BlockSums sums = sum_block(static_cast<Sum>(changes), warp_sums);
    const int before = static_cast<int>(sums.before), all = static_cast<int>(sums.all);
    for (int base = 0; base < all; base += kMostEnds) {
      if (changes > 0 && before < base + kMostEnds && before + changes > base) {
        int rank = before - base;
        stream.for_each_change(own, [&](int64_t pixel) {
          if (rank >= 0 && rank < kMostEnds) encoder.end(rank) = pixel;
          ++rank;
        });
      }
      encoder.append(min(all - base, kMostEnds));
    }
  }
  encoder.finish(int64_t{args.height} * args.width);
  if constexpr (!kWrite) {
    const Sum length = encoder.length();
    if (threadIdx.x == 0) args.offsets[n + 1] = static_cast<int64_t>(length);
  }
}

// One block.
__global__ void __launch_bounds__(kEncodeThreads) add_lengths(RleArguments args) {
  PANFPN_SHARED(Sum, warp_sums, kEncodeWarps);
  Sum before = 0;
  if (threadIdx.x == 0) args.offsets[0] = 0;
  for (int64_t first = 0; first < args.count; first += kEncodeThreads) {
    const int64_t n = first + threadIdx.x;
    const Sum length = n < args.count ? static_cast<Sum>(args.offsets[n + 1]) : 0;
    const BlockSums sums = sum_block(length, warp_sums);
    if (n < args.count) args.offsets[n + 1] = static_cast<int64_t>(before + sums.before + length);
    before += sums.all;
  }
}

constexpr int64_t kBatchBytes = int64_t{128} << 20;  // bits of 960 instances on an image of 800 x 1333
constexpr unsigned kRasteriseBlocks = 16;            // for each instance

// `has_bits` says that `args.bits` has the bits of all instances.
template <bool kWrite>
void launch_encode(const RleArguments& args, int64_t batch, bool has_bits, cudaStream_t stream) {
  for (int64_t begin = 0; begin < args.count; begin += batch) {
    const auto instances = static_cast<unsigned>(std::min(batch, args.count - begin));
    if (!has_bits) {
      PANFPN_LAUNCH(rasterise_columns, dim3(instances, kRasteriseBlocks), dim3(kRasteriseThreads), 0, stream,
                    args, begin);
    }
    PANFPN_LAUNCH(encode_runs<kWrite>, dim3(instances), dim3(kEncodeThreads), 0, stream, args, begin);
  }
}

std::tuple<Tensor, Tensor> paste_masks_rle(const Tensor& masks_in, const Tensor& boxes_in, int64_t height,
                                           int64_t width, double threshold) {
  const char* op = "paste_masks_rle";
  check_paste_masks_inputs(masks_in, boxes_in, height, width, op);
  STD_TORCH_CHECK(masks_in.scalar_type() == ScalarType::Float, op,
                  ": masks and boxes must be float32 on a GPU");
  const int64_t count = masks_in.size(0);
  constexpr int64_t kMost = int64_t{1} << 31;  // the largest grid has one block less
  STD_TORCH_CHECK(count < kMost, op, ": at most ", kMost - 1, " masks are supported on a GPU, got ", count);
  const DeviceGuard guard(masks_in.get_device_index());
  const Tensor masks = torch::stable::contiguous(masks_in), boxes = torch::stable::contiguous(boxes_in);
  const int64_t image_words = (height + kWarp - 1) / kWarp * width;
  const int64_t batch = std::clamp<int64_t>(kBatchBytes / std::max<int64_t>(4 * image_words, 1), 1,
                                            std::max<int64_t>(count, 1));
  const Tensor bits = empty({batch * image_words}, ScalarType::Int, masks);
  constexpr int64_t kWindowInts = sizeof(Window) / sizeof(int);
  const Tensor windows = empty({count, kWindowInts}, ScalarType::Int, masks);
  Tensor offsets = empty({count + 1}, ScalarType::Long, masks);
  RleArguments args{masks.const_data_ptr<float>(),
                    boxes.const_data_ptr<float>(),
                    static_cast<int>(count),
                    static_cast<int>(masks.size(1)),
                    static_cast<int>(masks.size(2)),
                    static_cast<int>(height),
                    static_cast<int>(width),
                    static_cast<float>(threshold),
                    static_cast<Window*>(windows.mutable_data_ptr()),
                    static_cast<unsigned int*>(bits.mutable_data_ptr()),
                    image_words,
                    offsets.mutable_data_ptr<int64_t>(),
                    nullptr};
  const auto stream = current_stream(masks);
  const auto plan_blocks = static_cast<unsigned>((count + kPlanThreads - 1) / kPlanThreads);
  PANFPN_LAUNCH(find_windows, dim3(plan_blocks), dim3(kPlanThreads), 0, stream, args);
  launch_encode</*kWrite=*/false>(args, batch, /*has_bits=*/false, stream);
  PANFPN_LAUNCH(add_lengths, dim3(1), dim3(kEncodeThreads), 0, stream, args);
  Tensor text = empty({item_int64(torch::stable::narrow(offsets, 0, count, 1))}, ScalarType::Byte, masks);
  args.text = text.mutable_data_ptr<uint8_t>();
  launch_encode</*kWrite=*/true>(args, batch, /*has_bits=*/batch >= count, stream);
  return {text, offsets};
}

}  // namespace

PANFPN_LIBRARY_IMPL(m) {
  m.impl("paste_masks_rle", TORCH_BOX(&paste_masks_rle));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
