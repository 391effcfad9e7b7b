/* generate_c BUNDLE PROMPT OUT.png: one image, with a line for every grid row. */
#include <stdio.h>

#include "ssd_runtime/ssd_runtime.h"

static int on_row(ssd_row_event const* event, void* user_data) {
    (void)user_data;
    fprintf(stderr, "\rrow %u of %u", event->row + 1, event->num_rows);
    return 0; /* anything else cancels */
}

int main(int argc, char** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: generate_c BUNDLE PROMPT OUT.png\n");
        return 2;
    }
    ssd_error error;
    ssd_model* model = NULL;
    ssd_generation* generation = NULL;

    ssd_model_params model_params;
    ssd_model_params_init(&model_params, sizeof model_params);
    model_params.bundle = argv[1];
    if (ssd_model_create(&model_params, &model, &error) != SSD_OK)
        goto failed;

    ssd_generate_params params;
    if (ssd_generate_params_init(&params, sizeof params, model, &error) != SSD_OK)
        goto failed;
    ssd_prompt prompt = {argv[2], NULL, 0};
    params.prompts = &prompt;
    params.num_prompts = 1;
    params.on_row = on_row;
    if (ssd_generation_create(model, &params, &generation, &error) != SSD_OK)
        goto failed;
    if (ssd_generate(generation, &error) != SSD_OK)
        goto failed;

    ssd_images images = {.struct_size = sizeof images};
    if (ssd_generation_images(generation, &images, &error) != SSD_OK)
        goto failed;
    char const* texts[] = {"prompt", argv[2]};
    if (ssd_write_png(argv[3], images.pixels, images.width, images.height, texts, 1, &error) !=
        SSD_OK)
        goto failed;

    ssd_generation_destroy(generation);
    ssd_model_destroy(model);
    fprintf(stderr, "\r%s\n", argv[3]);
    return 0;

failed:
    fprintf(stderr, "error: %s\n", error.message);
    ssd_generation_destroy(generation);
    ssd_model_destroy(model);
    return 1;
}
