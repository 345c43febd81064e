// Which kernel scaled_dot_product_attention becomes. Torch's own answer is in its CUDA library, which asks a real GPU; the
// conditions are those of ATen/native/transformers/cuda/sdp_utils.cpp for tensors that are not nested.
#include <ATen/Context.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <array>
#include <cmath>
#include <vector>
namespace {
using sdp::SDPBackend;
using Params = sdp::sdp_params;
struct {
  bool hip;
  bool prefers_cudnn;
} gpu;

constexpr std::array<at::ScalarType, 2> halves{at::kHalf, at::kBFloat16};
constexpr std::array<at::ScalarType, 3> halves_and_single{at::kHalf, at::kBFloat16, at::kFloat};

template <bool ignore_singleton>
bool fits_any(const Params& p) {
  return sdp::check_tensor_shapes(p, false) && sdp::check_nonzero_sequence_lengths_dense(p, false) &&
      sdp::check_last_dim_stride_equals_1_dense<ignore_singleton>(p, false);
}

bool fits_flash(const Params& p) {
  if (!sdp::check_runtime_disabled_flash(p, false) || !fits_any<true>(p)) return false;
  const auto width = p.query.sym_size(-1);
  return sdp::check_for_attn_mask(p, false) && width == p.key.sym_size(-1) && width == p.value.sym_size(-1) &&
      width <= (gpu.hip ? 512 : 256) && (!p.is_causal || p.query.sym_size(-2) == p.key.sym_size(-2)) &&
      sdp::check_tensor_dtype(p, halves, false) && sdp::check_batch_size_and_num_heads_dense<true>(p, false);
}

bool fits_efficient(const Params& p) {
  if (!sdp::check_runtime_disabled_mem_efficient(p, false) || !fits_any<false>(p)) return false;
  const auto width = p.query.sym_size(-1), last = p.value.sym_size(-1);
  const int aligned = p.query.scalar_type() == at::kFloat ? 4 : 8;
  return width == p.key.sym_size(-1) && width % aligned == 0 && last % aligned == 0 &&
      (!gpu.hip || (width == last && width <= 512)) && sdp::check_tensor_dtype(p, halves_and_single, false) &&
      sdp::check_batch_size_and_num_heads_dense<false>(p, false);
}

bool fits_cudnn(const Params& p) {
  if (gpu.hip || !at::globalContext().userEnabledCuDNNSDP() || !fits_any<true>(p)) return false;
  const auto width = p.query.sym_size(-1), last = p.value.sym_size(-1);
  return sdp::check_attn_mask_shape(p, false) && !at::globalContext().deterministicAlgorithms() &&
      std::floor(p.dropout * 16) == p.dropout * 16 && ((width <= 128 && last <= 128) || (width == 192 && last == 128)) &&
      width % 8 == 0 && last % 8 == 0 && p.key.sym_size(2) != 1 && (p.dropout == 0 || p.query.sym_size(2) != 1) &&
      sdp::check_tensor_dtype(p, halves, false) && sdp::check_batch_size_and_num_heads_dense<true, false>(p, false);
}

int64_t choose(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const std::optional<at::Tensor>& mask, double dropout, bool is_causal, std::optional<double>, bool enable_gqa) {
  const Params p{query, key, value, mask, dropout, is_causal, enable_gqa};
  if (sdp::has_only_dense_inputs(p)) {
    const bool first = gpu.prefers_cudnn && at::globalContext().sDPPriorityOrder()[0] == SDPBackend::flash_attention;
    if (first && fits_cudnn(p)) return static_cast<int64_t>(SDPBackend::cudnn_attention);
    for (const auto backend : at::globalContext().sDPPriorityOrder()) {
      if ((backend == SDPBackend::flash_attention && fits_flash(p)) ||
          (backend == SDPBackend::efficient_attention && fits_efficient(p)) ||
          (backend == SDPBackend::cudnn_attention && fits_cudnn(p)) ||
          (backend == SDPBackend::math && at::globalContext().userEnabledMathSDP()))
        return static_cast<int64_t>(backend);
    }
  }
  TORCH_CHECK(at::globalContext().userEnabledMathSDP(), "No available kernel of scaled_dot_product_attention fits.");
  return static_cast<int64_t>(SDPBackend::math);
}
}

extern "C" void install_fake_attention(int hip, int prefers_cudnn) {
  gpu = {hip != 0, prefers_cudnn != 0};
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(choose);
}
