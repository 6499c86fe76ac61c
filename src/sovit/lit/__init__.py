"""Lightning wiring: the module, the callbacks that write the records, the loggers, and the engine that runs a cell."""
