/* The warp of warp.py in one pass: image, label and weight of a patch, without an array of coordinates. Plain C.

   Each row of the patch is done in pieces of up to PIECE voxels that stay in the innermost cache: where its voxels come
   from (an affine line plus the elastic field, evaluated along one axis after the other), then for label, weight and
   image which voxels of the crop these are, then their values. Compilers vectorise most of these loops; on x86-64 they
   are compiled twice and the processor decides which is run. No products and sums are contracted (see setup.py), so that
   both, and every other processor, give the same bits.

   warp.py says what each result means; tests/test_warp_kernel.py holds this file to it. */

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float arithmetic is wider than float here, results would differ: the tensor code is used instead"
#endif

#define PIECE 256
/* Along an axis, so that nearest() is exact; of a crop, so that positions and one axis more fit in int32. */
#define MOST_ALONG_AXIS (1 << 22)
#define MOST_VOXELS (1 << 29)

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__
#else
#define INLINE static __forceinline
#define RESTRICT __restrict
#endif
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2 1
#else
#define HAVE_AVX2 0
#endif

#if defined(__clang__)
#define HAVE_VECTORS 1
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#elif defined(__GNUC__)
#define HAVE_VECTORS 1
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourPlaces){i, j, k, l})
#else
#define HAVE_VECTORS 0
#endif
#if HAVE_VECTORS
typedef float Four __attribute__((vector_size(16)));
typedef double Two __attribute__((vector_size(16)));
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#endif

/* One call. Axes are Z, Y, X; with D = 2 Z has one voxel and one point, and is left out of the sampling. */
typedef struct {
    int dims, bent;
    ptrdiff_t channels;
    int crop[3], patch[3], stride[3], points[3];
    const float *image, *weight;
    const int16_t *label;
    float *out_image, *out_weight;
    int16_t *out_label;
    double affine[3][4];    /* rows of (matrix, place of the patch's first voxel) */
    const float *control;   /* (D, *points), already turned by the matrix */
    const float *basis[3];  /* (points, size) along each axis */
    float *plane, *lines;   /* room for the field of one Z: at its points (Y, X), and along X at those of Y */
} Job;

/* The piece of a row that is worked on. */
typedef struct {
    int count;
    float at[3][PIECE];     /* where it comes from, voxels of the crop */
    float folded[3][PIECE]; /* the same brought inside */
    float share[3][PIECE];  /* of the second of the two voxels between which that lies */
    int32_t place[PIECE];   /* of the first one in the crop */
    int32_t outside[PIECE];
} Piece;

/* Half to even, as torch rounds; for -1 <= x <= MOST_ALONG_AXIS. Vectors know it without SSE4.1. */
INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* Within limits; what is not a number becomes the lower one. */
INLINE float limit(float x, float low, float high)
{
    x = x > low ? x : low;
    return x < high ? x : high;
}

/* out (count) += the sum over the points of weights[p * step] * rows, `length` apart.
   Cubic weights are four neighbours' and 0 elsewhere: four rows are one loop. */
INLINE void combine(float *RESTRICT out, int count, const float *rows, ptrdiff_t length, const float *weights, int points, int step)
{
    int p = 0;
    while (p < points && weights[(ptrdiff_t)p * step] == 0)
        p++;
    for (; p < points; p += 4) {
        float w[4];
        const float *row[4];
        for (int k = 0; k < 4; k++) {
            const int q = p + k < points ? p + k : points - 1;
            w[k] = p + k < points ? weights[(ptrdiff_t)q * step] : 0;
            row[k] = rows + q * length;
        }
        if (w[0] == 0 && w[1] == 0 && w[2] == 0 && w[3] == 0)
            continue;
        const float *RESTRICT a = row[0], *RESTRICT b = row[1], *RESTRICT c = row[2], *RESTRICT d = row[3];
        for (int i = 0; i < count; i++)
            out[i] += w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i];
    }
}

/* lines (D, points Y, X): the field of one Z, along X. */
INLINE void bend(const Job *job, int z)
{
    const int ny = job->points[1], nx = job->points[2], width = job->patch[2];
    const ptrdiff_t plane = (ptrdiff_t)ny * nx;
    memset(job->plane, 0, job->dims * plane * sizeof(float));
    memset(job->lines, 0, (ptrdiff_t)job->dims * ny * width * sizeof(float));
    for (int d = 0; d < job->dims; d++)
        combine(job->plane + d * plane, (int)plane, job->control + d * job->points[0] * plane, plane, job->basis[0] + z, job->points[0],
                job->patch[0]);
    for (int line = 0; line < job->dims * ny; line++)
        combine(job->lines + (ptrdiff_t)line * width, width, job->basis[2], width, job->plane + (ptrdiff_t)line * nx, nx, 1);
}

/* at: where the voxels of a row from x on come from, along every axis. */
INLINE void find(const Job *job, Piece *piece, int z, int y, int x)
{
    const int count = piece->count, ny = job->points[1], width = job->patch[2];
    for (int d = 3 - job->dims; d < 3; d++) {
        const double *row = job->affine[d];
        float *RESTRICT at = piece->at[d];
        const float start = (float)(row[3] + row[0] * z + row[1] * y + row[2] * x), step = (float)row[2];
        for (int i = 0; i < count; i++)
            at[i] = start + step * (float)i;
        if (job->bent)
            combine(at, count, job->lines + (ptrdiff_t)(d - 3 + job->dims) * ny * width + x, width, job->basis[1] + y, ny, job->patch[1]);
    }
}

/* Whether all of a piece lies between the centres of the crop's voxels. */
INLINE int is_inside(const Job *job, const Piece *piece)
{
    const int count = piece->count;
    int out = 0;
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = piece->at[d], high = (float)(job->crop[d] - 1);
        for (int i = 0; i < count; i++)
            out |= !(at[i] >= 0) | !(at[i] <= high);
    }
    return !out;
}

/* folded: at, mirrored about the outermost centres until it is inside. */
INLINE void mirror(const Job *job, Piece *piece)
{
    const int count = piece->count;
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = piece->at[d];
        float *RESTRICT folded = piece->folded[d];
        const float span = (float)(job->crop[d] - 1), length = span > 0 ? span : 1;
        for (int i = 0; i < count; i++) {
            const float there = limit(at[i], -1e9f, 1e9f), beyond = there < 0 ? -there : there;
            const int turns = (int)(beyond / length);
            const float rest = beyond - (float)turns * length;
            folded[i] = limit(turns & 1 ? span - rest : rest, 0, span);
        }
    }
}

/* folded: at, or the nearest centre of an outermost voxel. */
INLINE void hold(const Job *job, Piece *piece)
{
    const int count = piece->count;
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = piece->at[d];
        float *RESTRICT folded = piece->folded[d];
        const float span = (float)(job->crop[d] - 1);
        for (int i = 0; i < count; i++)
            folded[i] = limit(at[i], 0, span);
    }
}

/* place and share of coordinates that are inside. */
INLINE void locate(const Job *job, Piece *piece, float (*from)[PIECE])
{
    const int count = piece->count;
    int32_t *RESTRICT place = piece->place;
    memset(place, 0, count * sizeof(int32_t));
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = from[d];
        float *RESTRICT share = piece->share[d];
        const int last = job->crop[d] > 1 ? job->crop[d] - 2 : 0, stride = job->stride[d];
        for (int i = 0; i < count; i++) {
            const int below = (int)at[i] < last ? (int)at[i] : last;
            share[i] = at[i] - (float)below;
            place[i] += below * stride;
        }
    }
}

/* Between two values; exactly one of them where the share is 0 or 1. */
INLINE float between(float a, float b, float share) { return a * (1 - share) + b * share; }

/* The voxels from `first` on of a piece, one after the other. */
INLINE void interpolate_each(const Job *job, const Piece *piece, const float *RESTRICT values, float *RESTRICT out, int first)
{
    /* Along an axis of one voxel the neighbour, whose share is 0, is that voxel. */
    const int sz = job->crop[0] > 1 ? job->stride[0] : 0, sy = job->crop[1] > 1 ? job->stride[1] : 0, sx = job->crop[2] > 1;
    const int count = piece->count;
    for (int i = first; i < count; i++) {
        const float *v = values + piece->place[i];
        const float py = piece->share[1][i], px = piece->share[2][i];
        float left = between(v[0], v[sy], py), right = between(v[sx], v[sy + sx], py);
        if (job->dims == 3) {
            const float *w = v + sz;
            const float pz = piece->share[0][i];
            left = between(left, between(w[0], w[sy], py), pz);
            right = between(right, between(w[sx], w[sy + sx], py), pz);
        }
        out[i] = between(left, right, px);
    }
}

#if HAVE_VECTORS
/* Two neighbours each of two places. */
INLINE Four pairs(const float *a, const float *b)
{
    double two[2];
    memcpy(&two[0], a, sizeof(double));
    memcpy(&two[1], b, sizeof(double));
    const Two both = {two[0], two[1]};
    return (Four)both;
}

/* The same between four pairs of numbers. */
INLINE Four between4(Four a, Four b, Four share) { return a * (1 - share) + b * share; }

/* The voxels at two places: between Y and between Z, both X of each. */
INLINE Four columns(const Job *job, const float *v, const float *w, Four py, Four pz)
{
    const int sz = job->stride[0], sy = job->stride[1];
    const Four front = between4(pairs(v, w), pairs(v + sy, w + sy), py);
    if (job->dims == 2)
        return front;
    return between4(front, between4(pairs(v + sz, w + sz), pairs(v + sz + sy, w + sz + sy), py), pz);
}

INLINE int interpolate_fours(const Job *job, const Piece *piece, const float *RESTRICT values, float *RESTRICT out)
{
    const int count = piece->count;
    int i = 0;
    for (; i + 4 <= count; i += 4) {
        const int32_t *at = piece->place + i;
        Four pz = {0, 0, 0, 0}, py, px;
        memcpy(&py, piece->share[1] + i, sizeof py);
        memcpy(&px, piece->share[2] + i, sizeof px);
        if (job->dims == 3)
            memcpy(&pz, piece->share[0] + i, sizeof pz);
        const Four ab = columns(job, values + at[0], values + at[1], MIX(py, py, 0, 0, 1, 1), MIX(pz, pz, 0, 0, 1, 1));
        const Four cd = columns(job, values + at[2], values + at[3], MIX(py, py, 2, 2, 3, 3), MIX(pz, pz, 2, 2, 3, 3));
        const Four result = between4(MIX(ab, cd, 0, 2, 4, 6), MIX(ab, cd, 1, 3, 5, 7), px);
        memcpy(out + i, &result, sizeof result);
    }
    return i;
}
#endif

/* out (count): values of the crop, linear between the voxels of place. */
INLINE void interpolate(const Job *job, const Piece *piece, const float *RESTRICT values, float *RESTRICT out)
{
    int done = 0;
#if HAVE_VECTORS
    /* Neighbours are read together, so there must be some. */
    if (job->crop[0] > 1 - (job->dims == 2) && job->crop[1] > 1 && job->crop[2] > 1)
        done = interpolate_fours(job, piece, values, out);
#endif
    interpolate_each(job, piece, values, out, done);
}

/* out (count): the label of the nearest voxel, -1 outside. */
INLINE void pick(const Job *job, Piece *piece, int16_t *RESTRICT out)
{
    const int count = piece->count;
    const int16_t *RESTRICT label = job->label;
    int32_t *RESTRICT place = piece->place, *RESTRICT outside = piece->outside;
    memset(place, 0, count * sizeof(int32_t));
    memset(outside, 0, count * sizeof(int32_t));
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = piece->at[d];
        const int size = job->crop[d], stride = job->stride[d];
        for (int i = 0; i < count; i++) {
            const int voxel = (int)nearest(limit(at[i], -1, (float)size));
            outside[i] |= (voxel < 0) | (voxel >= size);
            place[i] += voxel * stride;
        }
    }
    for (int i = 0; i < count; i++)
        place[i] = outside[i] ? 0 : place[i];
    for (int i = 0; i < count; i++)
        out[i] = (int16_t)(label[place[i]] | -outside[i]);
}

/* out (count) of weights at the held places: to 1 within a voxel beyond the outermost centres. */
INLINE void fade(const Job *job, Piece *piece, float *RESTRICT out)
{
    const int count = piece->count;
    for (int d = 3 - job->dims; d < 3; d++) {
        const float *RESTRICT at = piece->at[d];
        const float size = (float)job->crop[d];
        for (int i = 0; i < count; i++) {
            const float below = 1 + at[i], above = size - at[i];
            /* Along an axis of one voxel nothing is between: its weight ends where its label does. */
            const float one = (at[i] >= -0.5f) & (at[i] <= 0.5f) ? 1.0f : 0.0f;
            const float part = size == 1 ? one : limit(below < above ? below : above, 0, 1);
            out[i] = part > 0 ? 1 + part * (out[i] - 1) : 1;
        }
    }
}

/* A piece of a row: everything at the places found. `to` is its first voxel in the patch. */
INLINE void sample(const Job *job, Piece *piece, ptrdiff_t to)
{
    const ptrdiff_t voxels = (ptrdiff_t)job->crop[0] * job->crop[1] * job->crop[2];
    const ptrdiff_t patch = (ptrdiff_t)job->patch[0] * job->patch[1] * job->patch[2];
    const int inside = is_inside(job, piece);
    pick(job, piece, job->out_label + to);
    if (inside)
        locate(job, piece, piece->at);
    if (job->weight != NULL) {
        if (!inside) {
            hold(job, piece);
            locate(job, piece, piece->folded);
        }
        interpolate(job, piece, job->weight, job->out_weight + to);
        if (!inside)
            fade(job, piece, job->out_weight + to);
    }
    if (!inside) {
        mirror(job, piece);
        locate(job, piece, piece->folded);
    }
    for (ptrdiff_t c = 0; c < job->channels; c++)
        interpolate(job, piece, job->image + c * voxels, job->out_image + c * patch + to);
}

INLINE void walk(const Job *job)
{
    Piece piece;
    ptrdiff_t to = 0;
    for (int z = 0; z < job->patch[0]; z++) {
        if (job->bent)
            bend(job, z);
        for (int y = 0; y < job->patch[1]; y++)
            for (int x = 0; x < job->patch[2]; x += PIECE) {
                piece.count = job->patch[2] - x < PIECE ? job->patch[2] - x : PIECE;
                find(job, &piece, z, y, x);
                sample(job, &piece, to);
                to += piece.count;
            }
    }
}

static void walk_plain(const Job *job) { walk(job); }
#if HAVE_AVX2
__attribute__((target("avx2"))) static void walk_avx2(const Job *job) { walk(job); }
#endif

/* How many of the ways to compute it this processor has: 1, with AVX2 2. (AVX-512 was no faster: most time goes to loads.) */
static int count_levels(void)
{
#if HAVE_AVX2
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? 2 : 1;
#else
    return 1;
#endif
}

static void run(const Job *job, int level)
{
#if HAVE_AVX2
    if (level == 2) {
        walk_avx2(job);
        return;
    }
#endif
    (void)level;
    walk_plain(job);
}
