(on request_headers
  (if (call $path @/204@) (then (call $say @204@ (call $reply #204 @body@)) (return #1)))
  (call $say @0@ (call $reply #0 @body@))
  (call $say @99@ (call $reply #99 @body@))
  (call $say @100@ (call $reply #100 @body@))
  (call $say @1000@ (call $reply #1000 @body@))
  #0)
