(on request_headers
  (call $say @resolve@ (call $resolve_shared_queue @consumer@ @jobs@ #8))
  (call $say @enqueue@ (call $enqueue_shared_queue (i32.load #8) @from another VM@))
  #0)
