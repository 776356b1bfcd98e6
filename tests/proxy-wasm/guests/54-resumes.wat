(on request_headers
  (call $say @reply@ (call $reply #403 @no@))
  (call $say @resume@ (call $continue_stream #0))
  #1)
