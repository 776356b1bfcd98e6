(on request_headers
  (call $num @small@ (memory.grow #1))
  (call $num @large@ (memory.grow #1024))
  #0)
