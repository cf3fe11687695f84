/* The Python module of _warp.h: checks what it is given before anything is read or written, and gives the interpreter
   to other threads meanwhile. _warp.pyi says what its functions take. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "_warp.h"

/* Raised whenever what resample() takes or gives changes: a build left from an older version is then not used. */
#define INTERFACE 1

enum { IMAGE, LABEL, WEIGHT, OUT_IMAGE, OUT_LABEL, OUT_WEIGHT, AFFINE, CONTROL, BASIS, ARRAYS = BASIS + 3 };

typedef struct {
    Py_buffer view[ARRAYS];
    int held[ARRAYS];
} Arrays;

/* One argument as a C-contiguous array of one format and number of axes; 0 and a ValueError where it is not. */
static int hold_array(Arrays *arrays, int which, PyObject *object, const char *name, const char *format, int axes)
{
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (which >= OUT_IMAGE && which <= OUT_WEIGHT ? PyBUF_WRITABLE : 0);
    Py_buffer *view = &arrays->view[which];
    if (PyObject_GetBuffer(object, view, flags) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s must be a contiguous array%s", name, flags & PyBUF_WRITABLE ? " that may be written" : "");
        return 0;
    }
    arrays->held[which] = 1;
    if (view->format == NULL || strcmp(view->format, format) != 0 || view->ndim != axes) {
        PyErr_Format(PyExc_ValueError, "%s must be of format '%s' with %d axes, got '%s' with %d", name, format, axes,
                     view->format == NULL ? "B" : view->format, view->ndim);
        return 0;
    }
    return 1;
}

static int same_shape(const Py_buffer *a, int a_first, const Py_buffer *b, int b_first, const char *names)
{
    int same = a->ndim - a_first == b->ndim - b_first;
    for (int i = 0; same && a_first + i < a->ndim; i++)
        same = a->shape[a_first + i] == b->shape[b_first + i];
    if (!same)
        PyErr_Format(PyExc_ValueError, "%s must have the same shape", names);
    return same;
}

/* Image, label and weight of a crop (IMAGE) or of a patch (OUT_IMAGE), and their shape. */
static int hold_patch(Arrays *arrays, int first, PyObject *three, int dims, int shape[3])
{
    if (!PyTuple_Check(three) || PyTuple_Size(three) != 3) {
        PyErr_SetString(PyExc_ValueError, "crop and patch must be tuples of image, label and weight or None");
        return 0;
    }
    if (!hold_array(arrays, first, PyTuple_GetItem(three, 0), "image", "f", dims + 1) ||
        !hold_array(arrays, first + 1, PyTuple_GetItem(three, 1), "label", "h", dims) ||
        !same_shape(&arrays->view[first], 1, &arrays->view[first + 1], 0, "image and label"))
        return 0;
    if (PyTuple_GetItem(three, 2) != Py_None &&
        (!hold_array(arrays, first + 2, PyTuple_GetItem(three, 2), "weight", "f", dims) ||
         !same_shape(&arrays->view[first + 1], 0, &arrays->view[first + 2], 0, "label and weight")))
        return 0;
    Py_ssize_t voxels = 1;
    for (int axis = 0; axis < dims; axis++) {
        const Py_ssize_t size = arrays->view[first + 1].shape[axis];
        if (size < 1 || size > MOST_ALONG_AXIS || voxels > MOST_VOXELS / size) {
            PyErr_Format(PyExc_ValueError, "sizes must be 1 to %d along an axis and %d in all, got %zd", MOST_ALONG_AXIS, MOST_VOXELS, size);
            return 0;
        }
        voxels *= size;
        shape[3 - dims + axis] = (int)size;
    }
    return 1;
}

/* The control points (D, *points) and for each axis the weights (points, size) by which they move its voxels. */
static int hold_bend(Arrays *arrays, PyObject *bend, Job *job)
{
    const int dims = job->dims, missing = 3 - dims;
    if (!PyTuple_Check(bend) || PyTuple_Size(bend) != dims + 1) {
        PyErr_Format(PyExc_ValueError, "bend must be None or a tuple of control points and %d arrays of weights", dims);
        return 0;
    }
    if (!hold_array(arrays, CONTROL, PyTuple_GetItem(bend, 0), "control", "f", dims + 1))
        return 0;
    const Py_ssize_t *shape = arrays->view[CONTROL].shape;
    Py_ssize_t values = dims;
    for (int axis = 0; axis < dims; axis++) {
        const Py_ssize_t points = shape[axis + 1], *basis;
        if (!hold_array(arrays, BASIS + axis, PyTuple_GetItem(bend, axis + 1), "basis", "f", 2))
            return 0;
        basis = arrays->view[BASIS + axis].shape;
        if (shape[0] != dims || points < 1 || points > MOST_ALONG_AXIS || values > MOST_VOXELS / points || basis[0] != points ||
            basis[1] != job->patch[missing + axis]) {
            PyErr_Format(PyExc_ValueError, "basis %d must be (points, size of the patch) and control (%d, *points), got (%zd, %zd) for %zd",
                         axis, dims, basis[0], basis[1], points);
            return 0;
        }
        values *= points;
        job->points[missing + axis] = (int)points;
        job->basis[missing + axis] = arrays->view[BASIS + axis].buf;
    }
    job->control = arrays->view[CONTROL].buf;
    job->bent = 1;
    return 1;
}

/* All arguments. */
static int hold_all(Arrays *arrays, Job *job, PyObject *crop, PyObject *patch, PyObject *affine, PyObject *bend)
{
    if (!hold_array(arrays, AFFINE, affine, "affine", "d", 2))
        return 0;
    const Py_ssize_t *shape = arrays->view[AFFINE].shape;
    if ((shape[0] != 2 && shape[0] != 3) || shape[1] != shape[0] + 1) {
        PyErr_Format(PyExc_ValueError, "affine must be (2, 3) or (3, 4), got (%zd, %zd)", shape[0], shape[1]);
        return 0;
    }
    const int dims = job->dims = (int)shape[0], missing = 3 - dims;
    if (!hold_patch(arrays, IMAGE, crop, dims, job->crop) || !hold_patch(arrays, OUT_IMAGE, patch, dims, job->patch))
        return 0;
    job->channels = arrays->view[IMAGE].shape[0];
    if (arrays->view[OUT_IMAGE].shape[0] != job->channels || arrays->held[WEIGHT] != arrays->held[OUT_WEIGHT]) {
        PyErr_Format(PyExc_ValueError, "crop and patch must have as many channels, and both or none a weight, got %zd and %zd channels",
                     job->channels, arrays->view[OUT_IMAGE].shape[0]);
        return 0;
    }
    for (int row = 0; row < dims; row++)
        for (int column = 0; column <= dims; column++)
            job->affine[missing + row][missing + column] = ((const double *)arrays->view[AFFINE].buf)[row * (dims + 1) + column];
    return bend == Py_None || hold_bend(arrays, bend, job);
}

/* Where arrays lie, and the room for the field of a row. */
static int prepare(const Arrays *arrays, Job *job)
{
    job->image = arrays->view[IMAGE].buf;
    job->label = arrays->view[LABEL].buf;
    job->weight = arrays->held[WEIGHT] ? arrays->view[WEIGHT].buf : NULL;
    job->out_image = arrays->view[OUT_IMAGE].buf;
    job->out_label = arrays->view[OUT_LABEL].buf;
    job->out_weight = arrays->held[WEIGHT] ? arrays->view[OUT_WEIGHT].buf : NULL;
    job->stride[2] = 1;
    job->stride[1] = job->crop[2];
    job->stride[0] = job->crop[1] * job->crop[2];
    if (!job->bent)
        return 1;
    const size_t rows = (size_t)job->dims * job->points[1];
    job->plane = malloc(rows * job->points[2] * sizeof(float));
    job->lines = malloc(rows * job->patch[2] * sizeof(float));
    return job->plane != NULL && job->lines != NULL;
}

static PyObject *resample(PyObject *self, PyObject *args)
{
    static const float one = 1;
    PyObject *crop, *patch, *affine, *bend, *done = NULL;
    int level = 0;
    Arrays arrays = {0};
    Job job = {.crop = {1, 1, 1}, .patch = {1, 1, 1}, .points = {1, 1, 1}, .basis = {&one, &one, &one}};
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO|i", &crop, &patch, &affine, &bend, &level))
        return NULL;
    const int levels = count_levels();
    if (level < 0 || level > levels)
        PyErr_Format(PyExc_ValueError, "level must be 0 to %d on this processor, got %d", levels, level);
    else if (hold_all(&arrays, &job, crop, patch, affine, bend)) {
        if (prepare(&arrays, &job)) {
            Py_BEGIN_ALLOW_THREADS;
            run(&job, level ? level : levels);
            Py_END_ALLOW_THREADS;
            done = Py_NewRef(Py_None);
        } else
            PyErr_NoMemory();
    }
    free(job.plane);
    free(job.lines);
    for (int which = 0; which < ARRAYS; which++)
        if (arrays.held[which])
            PyBuffer_Release(&arrays.view[which]);
    return done;
}

static PyObject *levels(PyObject *self, PyObject *args)
{
    (void)self;
    (void)args;
    return PyLong_FromLong(count_levels());
}

static PyMethodDef methods[] = {
    {"resample", resample, METH_VARARGS,
     "resample(crop, patch, affine, bend, level=0)\n\nFill `patch` from `crop`, each a tuple of image, label and weight or None."},
    {"levels", levels, METH_NOARGS, "levels()\n\nHow many instruction sets this processor can choose from, the plain one included."},
    {NULL, NULL, 0, NULL},
};

static int start(PyObject *module)
{
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) != 0 ||
                   PyModule_AddIntConstant(module, "MOST_ALONG_AXIS", MOST_ALONG_AXIS) != 0 ||
                   PyModule_AddIntConstant(module, "MOST_VOXELS", MOST_VOXELS) != 0
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_warp",
    .m_doc = "The warp of a training sample in one pass; see _warp.pyi.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__warp(void) { return PyModuleDef_Init(&definition); }
