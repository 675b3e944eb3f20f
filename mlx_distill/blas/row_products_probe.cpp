// Print up to how many rows the products of row_products.cpp are right, and faster than the BLAS.
//
// A program of its own: where a compiler and a processor disagree, it ends and nothing else does.

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

using Gemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                      float, float*, int);
using Floats = std::vector<float>;

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 };

constexpr int ROWS[] = {1, 2, 4, 8, 12, 16, 24, 32};
constexpr int SIZES = std::size(ROWS), ROUNDS = 10;
constexpr double SLACK = 1.25;  // so far apart are measurements of the same on a busy machine
constexpr int LAYERS = 12, WIDTH = 1024;  // 48 MB, which few caches hold

std::mt19937 generator(0);

int below(int limit) { return 1 + int(generator() % limit); }

Floats random(long size) {
    Floats values(size);
    for (float& value : values) value = float(generator() % 2001) / 1000 - 1;
    return values;
}

// Whether a product with uneven sizes and gaps is that of a plain loop in float64.
bool is_right(Gemm gemm, int m, int trans_w) {
    const int n = below(8) == 1 ? 1 : below(300), k = below(300), ldx = k + below(3), ldy = n + below(3);
    const int ldw = (trans_w == TRANSPOSE ? k : n) + below(3);
    const Floats x = random(long(m) * ldx), w = random((trans_w == TRANSPOSE ? n : k) * long(ldw));
    const float alpha = below(3), beta = below(3) - 1;
    const Floats before = beta ? random(long(m) * ldy)
                               : Floats(long(m) * ldy, std::numeric_limits<float>::quiet_NaN());
    Floats y = before;
    gemm(ROW_MAJOR, NO_TRANSPOSE, trans_w, m, n, k, alpha, x.data(), ldx, w.data(), ldw, beta,
         y.data(), ldy);
    for (int row = 0; row < m; row++)
        for (int column = 0; column < n; column++) {
            double sum = 0;
            for (int i = 0; i < k; i++) {
                const long from = trans_w == TRANSPOSE ? long(column) * ldw + i : long(i) * ldw + column;
                sum += double(x[long(row) * ldx + i]) * w[from];
            }
            const long at = long(row) * ldy + column;
            const double wanted = alpha * sum + (beta ? beta * double(before[at]) : 0);
            if (!(std::abs(y[at] - wanted) < 1e-4 * k)) return false;
        }
    return true;
}

double seconds(Gemm gemm, int m, const Floats& x, const std::vector<Floats>& layers, Floats& y) {
    const auto start = std::chrono::steady_clock::now();
    for (const Floats& w : layers)
        gemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, m, WIDTH, WIDTH, 1, x.data(), WIDTH, w.data(),
             WIDTH, 0, y.data(), WIDTH);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int main(int count, char** names) {
    if (count != 3) return 1;
    void* products = dlopen(names[1], RTLD_NOW);
    void* blas = dlopen(names[2], RTLD_NOW);
    if (!products || !blas) return 1;
    const auto theirs = reinterpret_cast<Gemm>(dlsym(blas, "cblas_sgemm"));
    const auto ours = reinterpret_cast<Gemm>(dlsym(products, "cblas_sgemm"));
    const auto use = reinterpret_cast<void (*)(void*, void*, int)>(dlsym(products, "mlx_distill_use"));
    void* threads = dlsym(blas, "openblas_get_num_threads");
    if (!theirs || !ours || !use || !threads) return 1;
    use(reinterpret_cast<void*>(theirs), threads, ROWS[SIZES - 1]);

    std::vector<Floats> layers;
    for (int i = 0; i < LAYERS; i++) layers.push_back(random(long(WIDTH) * WIDTH));
    const Floats x = random(long(ROWS[SIZES - 1]) * WIDTH);
    Floats y(x.size());
    double best[SIZES], theirs_best[SIZES];
    std::fill_n(best, SIZES, INFINITY);
    std::fill_n(theirs_best, SIZES, INFINITY);
    for (int i = 0; i < ROUNDS; i++)  // over the second that it takes, the machine is quiet once
        for (int size = 0; size < SIZES; size++) {
            best[size] = std::min(best[size], seconds(ours, ROWS[size], x, layers, y));
            const double other = seconds(theirs, ROWS[size], x, layers, y);
            theirs_best[size] = std::min(theirs_best[size], other);
        }
    int most = 0;
    for (int size = 0; size < SIZES && best[size] < SLACK * theirs_best[size]; size++) {
        for (int rows = most + 1; rows <= ROWS[size]; rows++)
            for (int i = 0; i < 8; i++)
                if (!is_right(ours, rows, i % 2 ? TRANSPOSE : NO_TRANSPOSE)) return 1;
        most = ROWS[size];
    }
    std::printf("%d\n", most);
}
