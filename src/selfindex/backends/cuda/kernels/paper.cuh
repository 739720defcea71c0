// First in the modules of the paper preset.
#define PAPER 1
