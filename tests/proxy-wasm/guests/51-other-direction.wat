(on request_headers
  (if (call $path @/local@) (then (call $say @reply@ (call $reply #403 @no@))))
  (call $say @resume@ (call $continue_stream #1))
  #0)
