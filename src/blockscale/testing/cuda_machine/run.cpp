// gemm.cu in one form, and the function by which Python runs it on the pretend Hopper.
#include <gemm.cu>

// Descriptors, arrays and numbers of one launch; the same words in cuda_machine/__init__.py.
struct Run {
    TensorMap a, a_last, b, a_scales, a_scales_last, out;
    Problem problem;
    long b_scale_count, bias_bytes, routing_count;
    // Until the kernel ahead has ended, the activation is NaN.
    const char* a_codes;
    long a_bytes;
    int grid;
    u32 seed;
};

extern "C" u32 shared_bytes() { return SHARED_BYTES; }

extern "C" int threads() { return THREADS; }

// What went wrong, empty if nothing did; valid until the next call.
extern "C" const char* run(const Run* run) {
    static std::string failure;
    machine::Launch launch;
    launch.grid = run->grid;
    launch.cluster = CLUSTER;
    launch.threads = THREADS;
    launch.shared_bytes = SHARED_BYTES;
    launch.chance.seed(run->seed);
    launch.readable = {
        {reinterpret_cast<const char*>(run->problem.b_scales), run->b_scale_count * sizeof(float),
         true},
        {static_cast<const char*>(run->problem.bias), static_cast<std::size_t>(run->bias_bytes)},
        {reinterpret_cast<const char*>(run->problem.routing), run->routing_count * sizeof(int)}};
    const TensorMap& out = run->out;
    launch.writable = {out.data, static_cast<std::size_t>(out.slots * out.rows * out.pitch)};
    launch.kernel_ahead = [run] { std::memcpy(run->a.data, run->a_codes, run->a_bytes); };
    launch.kernel = [run] {
        block_fp8_gemm(run->a, run->a_last, run->b, run->a_scales, run->a_scales_last, run->out,
                       run->problem);
    };
    failure = machine::run(launch);
    return failure.c_str();
}
