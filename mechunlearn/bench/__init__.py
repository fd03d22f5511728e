"""The program measured on known truth: suppressed models that an attack must get the knowledge back from."""
