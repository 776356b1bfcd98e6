(on request_headers
  (if (call $path @/given@) (then
    (call $say @reply@ (call $send_local_response #403 #0 #0 @not for you@ #0 #0 #5))
    (return #1)))
  (call $say @reply@ (call $reply #403 @not for you@))
  #1)
