// The pass over weights in training against the same in double, in buffers of exactly the right size. Included by
// kernels_test.cpp, whose helpers it uses.

namespace {

struct PruneCase {
    int rows, cols, height, width, isa, mode, threads;
    bool turned, masked, weighted;
    unsigned seed;
};

void run(const PruneCase& c) {
    std::mt19937 random(c.seed);
    std::uniform_real_distribution<float> number(-1, 1);
    const int grid_rows = c.rows / c.height, grid_cols = c.cols / c.width, blocks = grid_rows * grid_cols;
    const size_t size = (size_t)c.rows * c.cols;
    std::unique_ptr<float[]> target(new float[size]), other(new float[size]), coef(new float[(size_t)blocks]);
    std::unique_ptr<uint8_t[]> bits(new uint8_t[((size_t)blocks + 7) / 8]());
    for (size_t i = 0; i < size; i++) target[i] = number(random), other[i] = number(random);
    for (int i = 0; i < blocks; i++) coef[i] = 0.1f + fabsf(number(random));
    for (int i = 0; i < blocks; i++) bits[i / 8] |= (uint8_t)((number(random) > 0) << i % 8);
    const std::vector<float> before(target.get(), target.get() + size);
    const float* weight = c.mode == HFS_GRADIENT ? other.get() : before.data();
    const int64_t row_step = c.turned ? 1 : grid_cols, col_step = c.turned ? grid_rows : 1;
    const float scale = 2;
    const uint8_t moved = c.seed % 4 != 0;
    float penalty = NAN;
    const hfs_prune pass = {c.rows, c.cols, c.height, c.width, row_step, col_step, target.get(),
                            c.mode == HFS_GRADIENT ? other.get() : nullptr, c.masked ? bits.get() : nullptr,
                            c.weighted ? coef.get() : nullptr, c.mode == HFS_GRADIENT ? &scale : nullptr,
                            c.mode == HFS_SHRINK ? &moved : nullptr, c.mode == HFS_MASK ? nullptr : &penalty, 0.3f,
                            c.mode, c.isa, c.threads};
    const int status = hfs_prune_blocks(&pass);
    double worst = status ? INFINITY : 0, total = 0;
    for (int r = 0; r < grid_rows; r++) {
        for (int k = 0; k < grid_cols; k++) {
            const int64_t at = r * row_step + k * col_step;
            double squares = 0;
            const auto each = [&](auto visit) {
                for (int i = 0; i < c.height; i++) {
                    for (int j = 0; j < c.width; j++) visit((size_t)(r * c.height + i) * c.cols + k * c.width + j);
                }
            };
            each([&](size_t i) { squares += (double)weight[i] * weight[i]; });
            const double norm = sqrt(squares), share = (c.weighted ? coef[at] : 1.0) * 0.3 / norm;
            const bool keep = !c.masked || (bits[at / 8] >> at % 8 & 1);
            total += (c.weighted ? coef[at] : 1.0) * norm;
            each([&](size_t i) {
                double expected = before[i];
                if (c.mode == HFS_GRADIENT) expected += 2 * share * weight[i];
                if (c.mode == HFS_SHRINK && moved) expected *= share < 1 ? 1 - share : 0;
                if (!keep) expected = 0;
                const double error = fabs(target[i] - expected) / (keep ? 1e-6 * (1 + fabs(expected)) : 1e-300);
                if (!(error <= worst)) worst = error;
            });
        }
    }
    if (c.mode != HFS_MASK) {
        const double error = fabs(penalty - total) / (1e-6 * (1 + total));
        if (!(error <= worst)) worst = error;
    }
    cases++;
    if (!(worst <= 1)) {
        failures++;
        printf("FAILED pass over %dx%d in blocks of %dx%d isa %d mode %d threads %d turned %d masked %d weighted %d: status %d, "
               "error %.3g of the tolerance\n",
               c.rows, c.cols, c.height, c.width, c.isa, c.mode, c.threads, c.turned, c.masked, c.weighted, status, worst);
    }
}

void prune_refusals() {
    float target[4] = {1, 2, 3, 4}, penalty = -1;
    const hfs_prune good = {2, 2, 2, 1, 2, 1, target, nullptr, nullptr, nullptr, nullptr, nullptr, &penalty, 0.1f, HFS_SHRINK,
                            HFS_PORTABLE, 1};
    const auto bad = [&](auto change, int status, const char* what) {
        hfs_prune pass = good;
        change(pass);
        expect(hfs_prune_blocks(&pass) == status, what);
    };
    bad([](hfs_prune& p) { p.rows = -2; }, HFS_BAD_ARGUMENT, "a negative number of rows");
    bad([](hfs_prune& p) { p.cols = 1LL << 31; }, HFS_BAD_ARGUMENT, "too many columns");
    bad([](hfs_prune& p) { p.height = 0; }, HFS_BAD_ARGUMENT, "blocks of no height");
    bad([](hfs_prune& p) { p.width = 3; }, HFS_BAD_ARGUMENT, "blocks that do not tile");
    bad([](hfs_prune& p) { p.row_step = 3; }, HFS_BAD_INDEX, "bits that lie another way");
    bad([](hfs_prune& p) { p.mode = HFS_GRADIENT; }, HFS_BAD_ARGUMENT, "a gradient without a weight");
    bad([](hfs_prune& p) { p.mode = 3; }, HFS_BAD_ARGUMENT, "an unknown mode");
    bad([](hfs_prune& p) { p.target = nullptr; }, HFS_BAD_ARGUMENT, "a pass over nothing");
    bad([](hfs_prune& p) { p.isa = HFS_ISA_COUNT; }, HFS_NO_ISA, "a pass for an unknown instruction set");
    bad([](hfs_prune& p) { p.threads = 0; }, HFS_BAD_ARGUMENT, "a pass on no threads");
    expect(target[0] == 1 && target[3] == 4, "what is refused is left alone");
    bad([](hfs_prune& p) { p.rows = 0; }, HFS_OK, "a weight without rows");
    expect(penalty == 0, "the penalty of no rows");
    expect(hfs_prune_size() == sizeof good, "the size of a pass");
}

void passes() {
    prune_refusals();
    const int shapes[][4] = {{8, 16, 8, 1},  {24, 37, 8, 1}, {6, 5, 1, 1},      {12, 100, 4, 1}, {3, 48, 1, 8}, {32, 64, 32, 32},
                             {64, 3, 64, 1}, {7, 70, 7, 70}, {2, 2500, 1, 1250}, {9, 6, 3, 2},    {1, 1, 1, 1},  {5, 1100, 1, 1},
                             {3000, 20, 3000, 1}, {2, 6000, 1, 3000}};
    unsigned seed = 0;
    for (int isa = 0; isa < HFS_ISA_COUNT; isa++) {
        if (!hfs_isa_available(isa)) continue;
        for (const auto& shape : shapes) {
            for (int kind = 0; kind < 24; kind++) {
                run(PruneCase{shape[0], shape[1], shape[2], shape[3], isa, kind % 3, 1, kind / 3 % 2 == 1, kind / 6 % 2 == 1,
                              kind / 12 == 1, ++seed});
            }
        }
        for (int mode = 0; mode < 3; mode++) run(PruneCase{512, 300, 8, 1, isa, mode, 3, false, true, true, ++seed});
    }
}

}  // namespace
