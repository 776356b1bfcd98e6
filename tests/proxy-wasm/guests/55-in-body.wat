(on request_body
  (call $num @body@ (local.get $n))
  (call $say @reply@ (call $reply #403 @no@))
  #1)
