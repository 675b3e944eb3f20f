// Products of a few rows with a matrix, in front of a BLAS: y = alpha * x w^T + beta * y, and with a
// narrow w of as many rows as x has columns, y = alpha * x w + beta * y.
//
// A step of a language model multiplies one row, a call that verifies a draft a few. What takes the
// time is to read w, once. A BLAS copies it into another order first, which pays for hundreds of
// rows, or multiplies row by row. Here every row of w is read once, where it lies, while the rows
// of w after it are fetched, and is multiplied with all rows of x. What attention makes of its
// values is the other product; there, a BLAS loses time by sharing it out among threads. A row's
// result has the same bits beside any number of others. Everything else goes to the BLAS.
//
// Layout: x (m, k), w (n, k) or (k, n), and y (m, n), row by row, ld floats from row to row.

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

using Gemm = void (*)(int order, int trans_x, int trans_w, int m, int n, int k, float alpha,
                      const float* x, int ldx, const float* w, int ldw, float beta, float* y,
                      int ldy);

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 };  // the numbers of CBLAS

Gemm blas;              // everything that is not done here
int (*num_threads)();   // how many threads the BLAS uses now; so many are used here
int most_rows = 0;      // of x; more are left to the BLAS
pid_t process = 0;      // a forked process has none of the threads

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

// Rows of x and rows of w that are multiplied at once: as many sums as there is room for in 16
// registers, or in the 32 of AVX-512.
constexpr int ROWS = LANES == 16 ? 6 : 4, COLUMNS = LANES == 16 ? 4 : 3;
constexpr int NARROW = 256;   // columns of a w that is not transposed
constexpr int DOWN = 4;       // rows of x that are multiplied with it at once
constexpr int DEPTH = 256;    // rows of it that are multiplied at once; they stay in the cache
constexpr long CHUNK_BYTES = 64 << 10;  // of w: what a thread takes at a time, some microseconds
constexpr long LEAST_BYTES = 256 << 10;  // a smaller w is multiplied by the thread that asks
constexpr long MOST_CHUNKS = 1 << 14;
constexpr auto SPIN = std::chrono::microseconds(100);  // between two products of a layer it is 50

struct Product {
    int m, n, k;
    float alpha;
    const float* x;
    long ldx;
    const float* w;
    long ldw;
    float beta;
    float* y;
    long ldy;
    long chunk;  // rows of w that a thread takes at a time
};

// Load into a register, and stay there: the compiler would read it anew for every use, and two reads
// take as long as the multiplication (22 instead of 39 products a nanosecond, GCC 12 on an EPYC).
Vector load(const float* from) {
    Vector lanes = *reinterpret_cast<const Unaligned*>(from);
#if defined(__x86_64__)
    asm("" : "+v"(lanes));
#elif defined(__aarch64__)
    asm("" : "+w"(lanes));
#endif
    return lanes;
}

// Load the last few of a row; the other lanes are 0. A loop over single numbers would be rounded in
// one way or another, as the compiler likes it.
Vector load(const float* from, int count) {
    Vector lanes = {};
    std::memcpy(&lanes, from, count * sizeof(float));
    return lanes;
}

Vector spread(float value) { return value - Vector{}; }

// Return a * b + c with one rounding. Written out: a compiler that avoids chains of these for some
// processors does so in one function and not in the next, and a row's bits would depend on it.
Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// Return the sums of every two lanes that lie `HALF` apart, of a in the lanes without that bit and
// of b in those with it.
template <int HALF>
Vector folded(Vector a, Vector b) {
    typedef int Places __attribute__((vector_size(4 * LANES)));
    Places first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i & HALF ? LANES + i - HALF : i;
        second[i] = i & HALF ? LANES + i : i + HALF;
    }
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

// Return the sums of the lanes of N vectors, a lane for each; halves are added to halves, whatever
// N is. One by one that took longer than the multiplication of rows as short as a head.
template <int N, int HALF = LANES / 2>
Vector sums_of(Vector* lanes) {
    for (int i = 0; i < std::min(N, HALF); i++)
        lanes[i] = folded<HALF>(lanes[i], lanes[i + HALF < N ? i + HALF : i]);
    if constexpr (HALF == 1)
        return lanes[0];
    else
        return sums_of<std::min(N, HALF), HALF / 2>(lanes);
}

// Add a product to what is there, scaled; by 0, that is not read.
void scale(float product, float beta, float& to) {
    to = beta == 0 ? product : std::fma(beta, to, product);
}

// Write the sums of the lanes of N vectors, so many of them in a row.
template <int N>
void write(const Product& p, Vector* lanes, int columns, float* y, int place = 0) {
    constexpr int now = std::min(N, LANES);
    const Vector found = sums_of<now>(lanes) * p.alpha;
    for (int i = 0; i < now; i++, place++)
        scale(found[i], p.beta, y[place / columns * p.ldy + place % columns]);
    if constexpr (N > LANES) write<N - LANES>(p, lanes + LANES, columns, y, place);
}

// Multiply R rows of x with C rows of w, and fetch F of the rows of w from `ahead` on.
template <int R, int C, int F>
void multiply(const Product& p, const float* x, const float* w, const float* ahead, float* y) {
    Vector sums[R * C] = {};
    int k = 0;
    for (; k + LANES <= p.k; k += LANES) {
        if (k % 16 == 0)  // a line of the cache holds 16
#pragma GCC unroll 8
            for (int f = 0; f < F; f++) __builtin_prefetch(ahead + f * p.ldw + k, 0, 2);
        Vector columns[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) columns[c] = load(w + c * p.ldw + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector row = load(x + r * p.ldx + k);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r * C + c] = fused(row, columns[c], sums[r * C + c]);
        }
    }
    if (const int left = p.k - k)
        for (int c = 0; c < C; c++) {
            const Vector column = load(w + c * p.ldw + k, left);
            for (int r = 0; r < R; r++) {
                const Vector row = load(x + r * p.ldx + k, left);
                sums[r * C + c] = fused(row, column, sums[r * C + c]);
            }
        }
    write<R * C>(p, sums, C, y);
}

template <int C, int F>
void multiply(int rows, const Product& p, const float* x, const float* w, const float* ahead,
              float* y) {
    switch (rows) {
        case 1: return multiply<1, C, F>(p, x, w, ahead, y);
        case 2: return multiply<2, C, F>(p, x, w, ahead, y);
        case 3: return multiply<3, C, F>(p, x, w, ahead, y);
        case 4: return multiply<4, C, F>(p, x, w, ahead, y);
        case 5: return multiply<std::min(5, ROWS), C, F>(p, x, w, ahead, y);
        default: return multiply<ROWS, C, F>(p, x, w, ahead, y);
    }
}

// Multiply all rows of x with C rows of w from `column` on. The rows of w after them are fetched in
// turns, so that memory is read while later rows of x are multiplied, too.
template <int C>
void columns(const Product& p, long column) {
    const float* w = p.w + column * p.ldw;
    const int turns = (p.m + ROWS - 1) / ROWS;
    const float *x = p.x, *ahead = w + C * p.ldw;
    float* y = p.y + column;
    for (int turn = 0, fetched = 0; turn < turns; turn++) {
        const int rows = p.m / turns + (turn < p.m % turns);
        const int fetch = (C - fetched + turns - turn - 1) / (turns - turn);
        const float* from = ahead + fetched * p.ldw;
        switch (fetch) {
            case 0: multiply<C, 0>(rows, p, x, w, from, y); break;
            case 1: multiply<C, 1>(rows, p, x, w, from, y); break;
            case 2: multiply<C, std::min(2, C)>(rows, p, x, w, from, y); break;
            case 3: multiply<C, std::min(3, C)>(rows, p, x, w, from, y); break;
            default: multiply<C, C>(rows, p, x, w, from, y); break;
        }
        fetched += fetch;
        x += rows * p.ldx;
        y += rows * p.ldy;
    }
}

void multiply_chunk(const Product& p, long index) {
    long column = index * p.chunk;
    const long end = std::min<long>(p.n, column + p.chunk);
    for (; column + COLUMNS <= end; column += COLUMNS) columns<COLUMNS>(p, column);
    for (; column < end; column++) columns<1>(p, column);
}

// Multiply `depth` columns of R rows of x with as many rows of C vectors of w, and add them to y,
// which is scaled first.
template <int R, int C>
void multiply_down(const Product& p, const float* x, const float* w, int depth, float beta,
                   float* y) {
    Vector sums[R][C] = {};
    for (int k = 0; k < depth; k++) {
        Vector columns[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) columns[c] = load(w + k * p.ldw + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                sums[r][c] = fused(spread(x[r * p.ldx + k]), columns[c], sums[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < LANES; i++)
                scale(p.alpha * sums[r][c][i], beta, y[r * p.ldy + c * LANES + i]);
}

template <int C>
void multiply_down(const Product& p, int k, int column, int depth, float beta) {
    const float *x = p.x + k, *w = p.w + k * p.ldw + column;
    float* y = p.y + column;
    int row = 0;
    for (; row + DOWN <= p.m; row += DOWN)
        multiply_down<DOWN, C>(p, x + row * p.ldx, w, depth, beta, y + row * p.ldy);
    for (; row < p.m; row++)
        multiply_down<1, C>(p, x + row * p.ldx, w, depth, beta, y + row * p.ldy);
}

void multiply_narrow(const Product& p) {
    for (int k = 0; k < p.k; k += DEPTH) {
        const int depth = std::min(DEPTH, p.k - k);
        const float beta = k ? 1 : p.beta;
        int column = 0;
        for (; column + 2 * LANES <= p.n; column += 2 * LANES)
            multiply_down<2>(p, k, column, depth, beta);
        for (; column + LANES <= p.n; column += LANES)
            multiply_down<1>(p, k, column, depth, beta);
        const int left = p.n - column;
        for (int row = 0; left && row < p.m; row++) {
            Vector lanes = {};
            for (int i = k; i < k + depth; i++)
                lanes = fused(spread(p.x[row * p.ldx + i]),
                              load(p.w + i * p.ldw + column, left), lanes);
            for (int i = 0; i < left; i++)
                scale(p.alpha * lanes[i], beta, p.y[row * p.ldy + column + i]);
        }
    }
}

// One product at a time and the threads that help with it. `ticket` holds how many may help, the
// next chunk and the number of chunks: whoever raises it has that chunk. A thread that comes late
// takes none, so that a product waits for chunks that were begun and not for threads.
struct Team {
    std::mutex busy;
    Product product;
    std::atomic<uint64_t> ticket{0};
    std::atomic<long> done{0};
    int started = 0;

    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<int> asleep{0};

    static bool is_free(uint64_t ticket, int helper) {
        return uint32_t(helper) < (ticket >> 48) && (ticket >> 24 & 0xffffff) < (ticket & 0xffffff);
    }

    void work(int helper) {
        uint64_t now = ticket.load();
        while (is_free(now, helper))
            if (ticket.compare_exchange_weak(now, now + (uint64_t(1) << 24))) {
                multiply_chunk(product, now >> 24 & 0xffffff);
                done.fetch_add(1);
                now = ticket.load();
            }
    }

    void help(int helper) {
        auto since = std::chrono::steady_clock::now();
        while (true) {
            for (int i = 0; i < 1000 && !is_free(ticket.load(), helper); i++) relax();
            if (is_free(ticket.load(), helper)) {
                work(helper);
                since = std::chrono::steady_clock::now();
            } else if (std::chrono::steady_clock::now() - since < SPIN) {
                sched_yield();  // what builds the graph may wait for this core
            } else {
                std::unique_lock lock(sleep);
                asleep++;
                wake.wait(lock, [&] { return is_free(ticket.load(), helper); });
                asleep--;
            }
        }
    }

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void multiply(const Product& asked, long chunks, int helpers) {
        try {
            for (; started < helpers; started++) std::thread(&Team::help, this, started).detach();
        } catch (const std::system_error&) {  // the system gives no more
            helpers = started;
        }
        product = asked;
        done = 0;
        ticket = uint64_t(std::max(helpers, 1)) << 48 | uint64_t(chunks);  // 0 is who asks, too
        if (asleep) {
            std::lock_guard lock(sleep);
            wake.notify_all();
        }
        work(0);
        for (int i = 0; done.load() < chunks; i++) i < 1000 ? relax() : void(sched_yield());
    }
};

Team* team;  // never deleted: its threads end with the process

void multiply(Product p) {
    const long bytes = long(p.n) * p.k * sizeof(float);
    const int threads = num_threads();
    if (threads > 1 && bytes >= LEAST_BYTES && process == getpid() && team->busy.try_lock()) {
        const long chunks = std::min<long>(MOST_CHUNKS, bytes / CHUNK_BYTES);
        p.chunk = (p.n + chunks - 1) / chunks;
        p.chunk = (p.chunk + COLUMNS - 1) / COLUMNS * COLUMNS;
        team->multiply(p, (p.n + p.chunk - 1) / p.chunk, threads - 1);
        team->busy.unlock();
    } else {
        multiply_chunk(p, 0);
    }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Use a BLAS for what is not done here, so many threads as it says, and up to so many rows of x.
EXPORTED void mlx_distill_use(Gemm gemm, int (*threads)(), int rows) {
    blas = gemm;
    num_threads = threads;
    most_rows = rows;
    if (!team) team = new Team;
    process = getpid();
}

EXPORTED void cblas_sgemm(int order, int trans_x, int trans_w, int m, int n, int k, float alpha,
                          const float* x, int ldx, const float* w, int ldw, float beta, float* y,
                          int ldy) {
    const bool by_rows = trans_x == NO_TRANSPOSE || (m == 1 && ldx == 1);  // a row is both
    const bool ours = order == ROW_MAJOR && by_rows && m > 0 && n > 0 && k > 0 && alpha != 0;
    const bool as_row = trans_w == TRANSPOSE || (trans_w == NO_TRANSPOSE && ldw == 1);
    if (ours && n == 1 && ldy == 1 && as_row)  // a vector is the one row, and x the matrix
        multiply({1, m, k, alpha, w, k, x, ldx, beta, y, m, m});
    else if (ours && m <= most_rows && trans_w == TRANSPOSE)
        multiply({m, n, k, alpha, x, ldx, w, ldw, beta, y, ldy, n});
    else if (ours && m <= most_rows && trans_w == NO_TRANSPOSE && n <= NARROW)
        multiply_narrow({m, n, k, alpha, x, ldx, w, ldw, beta, y, ldy, n});
    else
        blas(order, trans_x, trans_w, m, n, k, alpha, x, ldx, w, ldw, beta, y, ldy);
}
