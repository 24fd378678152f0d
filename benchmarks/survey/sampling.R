# One step of package sampling: its CPU seconds on standard output, its result as doubles in a file.
# Rscript sampling.R STEP PIK W K OUT
suppressMessages(library(sampling))
args <- commandArgs(TRUE)
doubles <- function(path) readBin(path, "double", file.info(path)$size / 8)
pik <- doubles(args[2])
w <- if (file.exists(args[3])) doubles(args[3]) else NULL
k <- as.integer(args[4])
steps <- list(
  logits = function() { p <- UPMEpiktildefrompik(pik); p / (1 - p) },
  "logits, 1e-12" = function() { p <- UPMEpiktildefrompik(pik, eps = 1e-12); p / (1 - p) },
  marginals = function() UPMEpikfromq(UPMEqfromw(w, k)),
  joint = function() UPMEpik2frompikw(pik, w),
  sample = function() as.numeric(UPmaxentropy(pik))
)
step <- steps[[args[1]]]
start <- proc.time()
result <- step()
spent <- proc.time() - start
writeBin(as.numeric(result), args[5])
cat(sum(spent[c("user.self", "sys.self")]), "\n")
