/* ssd_runtime: generates images from a bundle that ssd-export wrote.
 *
 *   ssd_model        a bundle with its weights; any number of threads may use one at the same time
 *   ssd_generation   the images of one request; one thread at a time, except for ssd_cancel
 *
 * There is no global state: nothing to set up, nothing to shut down. Handles are made and destroyed
 * on any thread, in any order (a generation keeps its model alive) and any number of times; NULL
 * may be destroyed. Callbacks run on the thread that called ssd_generate.
 *
 * Every function that can fail returns a status and writes one sentence, with what to do about it,
 * into `error` unless that is NULL. Nothing is printed, nothing aborts. Text is UTF-8.
 *
 * Programs and libraries of different ages fit: every struct but ssd_error and ssd_prompt, which
 * stay as they are, begins with struct_size, sizeof the struct in the program that the caller was
 * compiled with. The init functions take and set it; where there is none, the caller does. Fields
 * are added at the end alone. What an older library does not know it leaves zero, or refuses.
 */
#ifndef SSD_RUNTIME_H
#define SSD_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define SSD_RUNTIME_VERSION_MAJOR 0
#define SSD_RUNTIME_VERSION_MINOR 1
#define SSD_RUNTIME_VERSION_PATCH 0

#define SSD_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ssd_status {
    SSD_OK = 0,
    SSD_CANCELLED = 1,        /* by ssd_cancel, or a callback that returned non-zero */
    SSD_INVALID_ARGUMENT = 2, /* a null handle, a number out of range, a prompt that does not fit */
    SSD_BAD_BUNDLE = 3,       /* missing, damaged, changed, or of a newer schema */
    SSD_UNAVAILABLE = 4,      /* this library or machine lacks a backend, provider or tokenizer */
    SSD_OUT_OF_MEMORY = 5,
    SSD_BUSY = 6,            /* another call on this generation is under way */
    SSD_CALLBACK_FAILED = 7, /* the callback threw a C++ exception */
    SSD_IO_ERROR = 8,        /* a file cannot be written */
    SSD_INTERNAL_ERROR = 9   /* a fault of this library or of its backend */
} ssd_status;

typedef struct ssd_error {
    ssd_status status;
    char message[1020]; /* one sentence; longer ones are cut */
} ssd_error;

typedef struct ssd_model ssd_model;
typedef struct ssd_generation ssd_generation;

/* "0.1.0", of the library at run time. */
SSD_API const char* ssd_version(void);
/* "bad bundle" and the like, for logs. */
SSD_API const char* ssd_status_name(ssd_status status);

/* ---- devices -------------------------------------------------------------------------------- */

typedef struct ssd_device {
    uint32_t struct_size;
    int32_t available;    /* 1: a model can be opened on it now; 0: see reason */
    int32_t index;        /* among the devices of its provider */
    char backend[16];     /* "onnxruntime", "tensorrt" or "tensorrt-rtx" */
    char provider[16];    /* "cpu" or "cuda" */
    char name[128];       /* of the processor */
    char reason[256];     /* what it lacks, and what to do about it */
    uint64_t total_bytes; /* memory; 0 where the system does not say */
    uint64_t free_bytes;
} ssd_device;

/* Writes the places where this library can generate, in order of preference, the unavailable ones
 * with their reasons. `count` gets how many there are, which may be more than `capacity`;
 * struct_size of devices[0] must be set and is the stride. devices may be NULL with capacity 0. */
SSD_API ssd_status ssd_devices(ssd_device* devices, size_t capacity, size_t* count,
                               ssd_error* error);

/* ---- models --------------------------------------------------------------------------------- */

typedef struct ssd_model_params {
    uint32_t struct_size;
    int32_t device;       /* among the devices of the provider */
    char const* bundle;   /* the bundle's folder */
    char const* backend;  /* as in ssd_device; NULL: the first that this library has */
    char const* provider; /* "cpu", "cuda"; NULL: cpu, or what TensorRT runs on */
    int32_t num_threads;  /* of the CPU; 0 chooses */
} ssd_model_params;

typedef struct ssd_model_info {
    uint32_t struct_size;
    uint32_t grid_rows, grid_columns; /* image tokens of an image */
    uint32_t width, height;           /* pixels */
    uint32_t codebook_size;
    uint32_t prompt_slots;        /* the longest prompt in tokens, control tokens included */
    uint32_t max_images;          /* the most images generated at the same time */
    int32_t has_tokenizer;        /* 0: prompts are given as token ids */
    float cfg_scale, temperature; /* what ssd_generate_params_init takes */
    char policy[32];
    double budget;
    char bundle_hash[65];        /* hexadecimal sha256 */
    uint32_t num_classes;        /* prompts are classes 0 .. num_classes - 1; 0: they are not */
    uint32_t embedding_width;    /* of captions that are read as embeddings; 0: prompts are not */
    int32_t decodes_in_int8;     /* 1: images are decoded by the bundle's int8 decoder */
    char why_float_decoder[256]; /* why not, where the bundle has one; else "" */
} ssd_model_info;

/* struct_size: sizeof *params. */
SSD_API void ssd_model_params_init(ssd_model_params* params, size_t struct_size);
/* Opens a bundle: checks every file against the manifest and loads the weights. */
SSD_API ssd_status ssd_model_create(ssd_model_params const* params, ssd_model** model,
                                    ssd_error* error);
SSD_API void ssd_model_destroy(ssd_model* model);
SSD_API ssd_status ssd_model_describe(ssd_model const* model, ssd_model_info* info,
                                      ssd_error* error);
/* Writes the token ids of a prompt, as generation would use them. `count` gets how many there are,
 * which may be more than `capacity`. */
SSD_API ssd_status ssd_encode(ssd_model const* model, char const* prompt, int32_t* ids,
                              size_t capacity, size_t* count, ssd_error* error);

typedef struct ssd_memory_plan {
    uint32_t struct_size;
    uint32_t num_images;
    uint64_t weight_bytes;     /* as stored in the bundle */
    uint64_t cache_bytes;      /* KV cache of all images: exactly what is allocated */
    uint64_t full_cache_bytes; /* keys and values of an uncompressed cache */
    uint64_t decoder_bytes;    /* estimate: the image decoder's activations */
    uint64_t peak_bytes;       /* estimate: of the process, or of the device */
    uint64_t free_bytes;       /* on the machine or device now; 0 where the system does not say */
} ssd_memory_plan;

/* What generating so many images at the same time takes, before anything is allocated. */
SSD_API ssd_status ssd_plan(ssd_model const* model, uint32_t num_images, uint32_t decoder_batch,
                            ssd_memory_plan* plan, ssd_error* error);

/* ---- generation ----------------------------------------------------------------------------- */

typedef struct ssd_prompt {
    char const* text;   /* of classes a number or name; white space around it is dropped. Or NULL */
    int32_t const* ids; /* and token ids as `ssd-export prompts` writes them, of classes the one */
    size_t num_ids;
} ssd_prompt;

/* A grid row is finished. Pointers are valid until the next call on the generation. */
typedef struct ssd_row_event {
    uint32_t struct_size;
    uint32_t row, num_rows;           /* of the images generated now */
    uint32_t first_image, num_images; /* these are the images generated now */
    uint32_t total_images;
    uint32_t num_tokens;   /* of an image */
    int32_t done;          /* 1: this was the last row of the last image */
    int32_t const* tokens; /* [num_images, num_tokens]; 0 where still to come */
    uint8_t const* pixels; /* RGB8 [num_images, height, width, 3]: with preview what there is so
                              far; without, the finished images at the last row, else NULL */
    uint32_t width, height;
    uint32_t passes; /* decode passes so far, of the images generated now */
} ssd_row_event;

/* Returns 0 to go on; anything else cancels. */
typedef int (*ssd_row_callback)(ssd_row_event const* event, void* user_data);

typedef struct ssd_generate_params {
    uint32_t struct_size;
    uint32_t num_images; /* of each prompt */
    ssd_prompt const* prompts;
    size_t num_prompts;
    uint64_t seed; /* image i depends on (seed, i) alone, on every backend */
    float cfg_scale;
    float temperature;      /* 0: the likeliest token */
    uint32_t top_k;         /* 0: all tokens */
    uint32_t max_batch;     /* images generated at the same time; the others follow */
    uint32_t decoder_batch; /* images decoded to pixels at the same time */
    int32_t preview;        /* 1: events carry the unfinished images, decoded at every row */
    ssd_row_callback on_row;
    void* user_data;
    uint8_t* pixels; /* where finished images go, RGB8 [images, height, width, 3]; NULL: the
                        library allocates */
    size_t pixels_bytes;
    uint64_t const* seeds; /* of each image, in place of seed: image i is what seeds[i] generates
                              first; or NULL */
    size_t num_seeds;
    ssd_prompt const* negative_prompts; /* what guidance leads away from: one for all, or one for
                              each prompt or each image; without text and ids, the model's own */
    size_t num_negative_prompts;
    int32_t lookahead; /* tokens of an image that a pass tries, for the same up to near ties, or
                          SSD_LOOKAHEAD_AUTO; 0 or 1: one by one. TensorRT: at most its engine's */
    float const* const* embeddings; /* in place of prompts, num_prompts times float32
                              [embedding_tokens[i], embedding_width] of a caption; or NULL */
    size_t const* embedding_tokens;
} ssd_generate_params;

enum { SSD_LOOKAHEAD_AUTO = -1 }; /* one image at a time, and where it pays */

/* Fills in the model's guidance and temperature, and one image a prompt. struct_size: sizeof
 * *params. */
SSD_API ssd_status ssd_generate_params_init(ssd_generate_params* params, size_t struct_size,
                                            ssd_model const* model, ssd_error* error);
/* Checks and copies the parameters; only `pixels` and `user_data` must outlive the call. */
SSD_API ssd_status ssd_generation_create(ssd_model* model, ssd_generate_params const* params,
                                         ssd_generation** generation, ssd_error* error);
/* Waits for nothing: the generation must not be in use on another thread. */
SSD_API void ssd_generation_destroy(ssd_generation* generation);

/* Generates all images, with a callback after every grid row. */
SSD_API ssd_status ssd_generate(ssd_generation* generation, ssd_error* error);
/* Generates one grid row, for callers that own the loop. `event` may be NULL; when its `done` is 1
 * there is nothing left, and a further call does nothing. No callback is called. */
SSD_API ssd_status ssd_step_row(ssd_generation* generation, ssd_row_event* event, ssd_error* error);

typedef enum ssd_cancel_when {
    SSD_CANCEL_NOW = 0, /* the call under way returns within a token, on TensorRT within a row */
    SSD_CANCEL_AFTER_IMAGES = 1 /* the images generated now are finished */
} ssd_cancel_when;

/* From any thread, any number of times; a finished generation stays as it is. when: one of
 * ssd_cancel_when. */
SSD_API ssd_status ssd_cancel(ssd_generation* generation, int32_t when, ssd_error* error);

typedef struct ssd_images {
    uint32_t struct_size;
    uint32_t num_images; /* finished ones: after cancelling fewer than asked for */
    uint32_t width, height;
    uint32_t num_tokens;
    uint8_t const* pixels; /* RGB8 [num_images, height, width, 3] */
    int32_t const* tokens; /* [num_images, num_tokens] */
} ssd_images;

/* The finished images; owned by the generation. */
SSD_API ssd_status ssd_generation_images(ssd_generation const* generation, ssd_images* images,
                                         ssd_error* error);

typedef struct ssd_cache_report {
    uint32_t struct_size;
    uint32_t num_images;
    uint64_t bytes; /* allocated now, counted, not computed */
    uint64_t image_bytes_per_image, full_image_bytes_per_image; /* slots of image tokens alone */
    uint64_t tokens_evicted;  /* (layer, KV head, token) triples evicted for an image */
    int32_t step_is_captured; /* 1: a token is one launch of a CUDA graph (TensorRT) */
} ssd_cache_report;

/* What the compression does, once the first row is generated. */
SSD_API ssd_status ssd_cache_bytes(ssd_generation const* generation, ssd_cache_report* report,
                                   ssd_error* error);

/* Writes RGB8 pixels as a PNG file, whole or not at all. texts: num_texts pairs of key and value
 * that become its text chunks; may be NULL. */
SSD_API ssd_status ssd_write_png(char const* path, uint8_t const* pixels, uint32_t width,
                                 uint32_t height, char const* const* texts, size_t num_texts,
                                 ssd_error* error);

#ifdef __cplusplus
}
#endif

#endif /* SSD_RUNTIME_H */
