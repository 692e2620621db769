"""kda_hf in other libraries. Each module imports its library when it is asked to, never before."""
