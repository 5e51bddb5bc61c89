// The namespace of the operators and the name of the module that holds them, which the build may choose: a kernel on Hugging
// Face's hub has names of its own, so that several versions of it can be in one process (kernel_hub/).
#pragma once

#include <torch/library.h>

#ifndef SELFDISTILL_NAMESPACE
#define SELFDISTILL_NAMESPACE selfdistill
#endif

// One level more than it takes to write these, because torch's macros do not expand what they are given.
#define SELFDISTILL_DEFINE(name, m) TORCH_LIBRARY(name, m)
#define SELFDISTILL_IMPLEMENT(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)
#define SELFDISTILL_LIBRARY(m) SELFDISTILL_DEFINE(SELFDISTILL_NAMESPACE, m)
#define SELFDISTILL_LIBRARY_IMPL(key, m) SELFDISTILL_IMPLEMENT(SELFDISTILL_NAMESPACE, key, m)

// Importing the module loads the library; nothing else is in it. Wants Python.h, as the first of all includes.
#define SELFDISTILL_INIT(name) PyInit_##name
#define SELFDISTILL_TEXT(name) #name
#define SELFDISTILL_DEFINE_MODULE(name)                                                                                 \
  PyMODINIT_FUNC SELFDISTILL_INIT(name)() {                                                                             \
    static PyModuleDef module = {                                                                                       \
        PyModuleDef_HEAD_INIT, SELFDISTILL_TEXT(name), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};       \
    return PyModule_Create(&module);                                                                                    \
  }
#define SELFDISTILL_MODULE(name) SELFDISTILL_DEFINE_MODULE(name)
