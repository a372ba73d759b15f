# pip's hundreds of lines as one that moves: packages fetched of all, and the time that the rest will take.
#   pip install ... | awk -v total=190 -f requirements/progress.awk
BEGIN { srand(); start = srand() }  # srand() gives back the seed before it: the clock
/^(Collecting|Processing) / {
  fetched++
  sub(/.*\//, "", $2)
  srand(); now = srand()
  left = fetched > 5 && fetched < total ? sprintf(", about %d s left to fetch", (now - start) / fetched * (total - fetched)) : ""
  printf "\r\033[K  fetching %d of %d: %s%s", fetched, total, $2, left
  fflush()
}
/^Installing collected packages/ { printf "\r\033[K  unpacking %d packages, about 2 minutes\n", total; fflush() }
